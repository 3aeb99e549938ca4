"""Documents to tokens on disk, and tokens to rows."""
