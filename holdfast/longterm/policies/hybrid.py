"""The default: remember every turn and fact as it is, recall by hybrid search.

Keeps    all that was said; a fact that is said again is touched.
Form     turns and facts as text, with vectors of each and of its surroundings.
Bytes    text + row + vectors, see `holdfast.longterm.retrieval.corpus`.
Source   see `holdfast.longterm.retrieval.corpus`.
Departs  nothing is extracted, so that nothing can be lost or invented while writing.
"""

from holdfast.longterm.policy import Policy


class Hybrid(Policy):
    """What `Policy` does by itself."""
