"""`python -m stripe` runs the same program as the command `stripe`."""

from stripe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
