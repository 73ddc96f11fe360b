"""`python -m coupon_svc` is `coupon-svc`."""

import sys

from coupon_svc.cli import main

if __name__ == "__main__":
    sys.exit(main())
