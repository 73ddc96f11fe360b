"""`python -m coupon_svc` is `coupon-svc`."""

import sys


def main() -> int:
    """Run a command and return its exit status. Imports take a second: they are within, so that Ctrl-C ends them quietly."""
    try:
        from coupon_svc.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
