"""How bytes are written: forms of one tensor, and Packed, a tensor written in a form."""

from holdfast.forms.affine import Affine, Int4, Int8
from holdfast.forms.base import Form
from holdfast.forms.blockwise import Blockwise
from holdfast.forms.dense import Dense
from holdfast.forms.fp8 import Fp8
from holdfast.forms.packed import Packed
from holdfast.forms.rank1 import Rank1

__all__ = ["Affine", "Blockwise", "Dense", "Form", "Fp8", "Int4", "Int8", "Packed", "Rank1"]
