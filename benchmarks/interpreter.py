"""Triton's interpreter with bfloat16 corrected: as shipped, it multiplies bits and truncates."""


def correct_bfloat16() -> None:
    """Make bfloat16 right under the interpreter, for this process: products of values, nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    shipped_dot, shipped_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    shipped_convert = InterpreterBuilder.create_fp_to_fp
    if getattr(shipped_dot, "corrected", False):
        return

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(handle: TensorHandle) -> TensorHandle:
        bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        nan = np.isnan(handle.data)
        return TensorHandle(np.where(nan, np.uint16(0x7FC0), nearest), tl.bfloat16)

    def converted(handle: TensorHandle, dtype: tl.dtype) -> TensorHandle | None:
        pair = (handle.dtype.scalar, dtype.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return rounded(handle)
        return widened(handle) if pair == (tl.bfloat16, tl.float32) else None

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return shipped_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        own = converted(src, dst_type)
        return shipped_cast(self, src, dst_type) if own is None else own

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        own = converted(src, dst_type)
        return shipped_convert(self, src, dst_type, rounding_mode) if own is None else own

    create_dot.corrected = True
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
