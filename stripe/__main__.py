"""`python -m stripe` is `stripe`."""

from stripe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
