"""Being here, beside ``__init__.py``, it puts the repository root on ``sys.path``: ``from tests.models import ...``."""
