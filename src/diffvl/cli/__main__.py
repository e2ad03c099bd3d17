"""`python -m diffvl.cli`, which `accelerate launch -m diffvl.cli` needs."""

from diffvl.cli.main import main

if __name__ == "__main__":
    main()
