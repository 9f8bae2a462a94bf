"""The index of a checkpoint's tensors is a pickle that may name torch's own records only."""

import io
import pickle

import pytest

from megatron_avatar.resilience import index


class Lookup:
    """Asks a loader for an attribute of a class of the index that is no member of its enumeration."""

    def __reduce__(self):
        return getattr, (index._MEM_FORMAT_ENCODING, "mro")


def test_an_index_may_name_members_of_its_enumeration_only():
    member = index._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert index._IndexUnpickler(io.BytesIO(pickle.dumps(member))).load() is member
    assert index._memory_format(type(member), member.name) is member
    with pytest.raises(pickle.UnpicklingError, match="getattr"):
        index._IndexUnpickler(io.BytesIO(pickle.dumps(Lookup()))).load()
