from sparsellm.app.cli import main

main()
