"""The source of an encoder-decoder's sequence: read once, whole, and kept in blocks of the same pool.

Standard library only. What every layer attends to of a source (its keys and values) stands in blocks of the
one cache, in a second table of the sequence, from the step that reads it until the sequence ends or is
preempted. Samples share it. Freed blocks stay findable: the same source, asked again under the same salt and
adapter, need not be read again. As every token of a source attends to every other, only a whole one is a hit.
"""

from __future__ import annotations

from salver.server.engine.blocks import BlockPool, block_digest
from salver.server.engine.sequence import Sequence


def source_digests(sequence: Sequence, pool: BlockPool) -> list[bytes]:
    """Names of a source's blocks: a chain from all of its tokens."""
    digest = sequence.source_digest()
    names = []
    for index in range(pool.blocks_for(sequence.num_source_tokens)):
        digest = block_digest(digest, (index,))
        names.append(digest)
    return names


def cached_source(sequence: Sequence, pool: BlockPool) -> list[int]:
    """The blocks of the sequence's source, if it was read before and all are still there; else none."""
    if not sequence.reads_source_cache:
        return []
    wanted = source_digests(sequence, pool)
    found = pool.lookup(wanted)
    return found if len(found) == len(wanted) else []


def take_source(sequence: Sequence, pool: BlockPool, cached: list[int]) -> None:
    """Gives the sequence its source's blocks: the cached ones, or fresh ones that a step must fill."""
    pool.share(cached)
    sequence.cross_table = cached or pool.allocate(pool.blocks_for(sequence.num_source_tokens))
    sequence.source_read = bool(cached)


def source_was_read(sequence: Sequence, pool: BlockPool) -> None:
    """A step has filled the blocks: they can be found."""
    sequence.source_read = True
    for block, digest in zip(sequence.cross_table, source_digests(sequence, pool), strict=True):
        pool.register(block, digest)


def share_source(sequence: Sequence, other: Sequence, pool: BlockPool) -> None:
    """`other`, a sample of the same request, owns the source's blocks too."""
    pool.share(sequence.cross_table)
    other.cross_table = list(sequence.cross_table)
    other.source_read = sequence.source_read


def free_source(sequence: Sequence, pool: BlockPool) -> None:
    """Its blocks have one owner less; it must be read again."""
    pool.free(sequence.cross_table)
    sequence.cross_table = []
    sequence.source_read = False
