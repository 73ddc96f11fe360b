"""Parts that are killed, cut off, stopped or lied to, in stacks of their own."""
