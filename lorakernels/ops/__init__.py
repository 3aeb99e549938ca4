"""Fused operations, one folder each: reference, ATen and Triton implementations and the public function."""
