"""Run `stripe fold`."""

from stripe.cli import script

if __name__ == "__main__":
    raise SystemExit(script("fold"))
