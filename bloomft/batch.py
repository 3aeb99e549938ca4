"""What a batch is, for those who make it and those who take it: three tensors [B, T].

input_ids int64; labels int64, the input ids unshifted, `IGNORE_INDEX` where nothing is to be learned;
document_ids int32, which count 0, 1, 2... in a row and are `PADDING_ID` on its padding.
"""

from torch import Tensor

IGNORE_INDEX = -100
PADDING_ID = -1  # a document of its own, which attends to nothing real

Batch = dict[str, Tensor]
