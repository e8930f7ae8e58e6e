from sparsellm.cli import main

main()
