"""What must always be true, each thing told once: for `coupon-svc verify`, the audit of a load, and the fault suite."""
