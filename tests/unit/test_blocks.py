"""The block pool: nothing lost, nothing owned twice, whatever is taken and returned."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from salver.server.engine.blocks import (
    NULL_BLOCK,
    BlockPool,
    IntegrityError,
    OutOfBlocks,
    block_digest,
    root_digest,
)


def chain(*token_ids: int, salt: str = "") -> list[bytes]:
    digests, parent = [], root_digest(salt)
    for token_id in token_ids:
        parent = block_digest(parent, [token_id])
        digests.append(parent)
    return digests


def test_takes_the_least_recently_freed_first() -> None:
    pool = BlockPool(5, 16)
    first = pool.allocate(4)
    assert NULL_BLOCK not in first
    pool.free([first[2]])
    pool.free([first[0]])
    assert pool.allocate(2) == [first[2], first[0]]


def test_a_table_is_freed_from_its_end() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(3)
    pool.free(table)
    assert pool.allocate(1) == [table[-1]], "a prefix's end goes before its beginning"


def test_taking_more_than_is_free_takes_nothing() -> None:
    pool = BlockPool(4, 16)
    with pytest.raises(OutOfBlocks):
        pool.allocate(4)
    assert pool.num_free == 3


def test_a_freed_block_is_found_until_it_is_taken_again() -> None:
    pool = BlockPool(3, 1)
    digests = chain(7, 8)
    table = pool.allocate(2)
    for block, digest in zip(table, digests, strict=True):
        pool.register(block, digest)
    pool.free(table)
    assert pool.lookup(digests) == table
    assert pool.lookup(chain(7, 9)) == table[:1]
    assert pool.lookup(chain(7, 8, salt="other tenant")) == []
    pool.share(table[:1])
    assert pool.num_free == 1
    assert pool.allocate(1) == table[1:]
    assert pool.lookup(digests) == table[:1]
    pool.check_integrity([table[:1], table[1:]])


def test_integrity_sees_a_lost_block() -> None:
    pool = BlockPool(4, 16)
    table = pool.allocate(2)
    pool.check_integrity([table])
    with pytest.raises(IntegrityError):
        pool.check_integrity([table[:1]])
    with pytest.raises(IntegrityError):
        pool.check_integrity([table, table])
    pool.free(table)
    with pytest.raises(IntegrityError):
        pool.free(table)


class Pool(RuleBasedStateMachine):
    """Random takes, shares, registrations and returns against a plain model of who owns what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9, 1)
        self.tables: list[list[int]] = []
        self.digests = chain(*range(9))

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        try:
            table = self.pool.allocate(count)
        except OutOfBlocks:
            assert count > free
            return
        assert len(set(table)) == count <= free
        self.tables.append(table)
        for block, digest in zip(table, self.digests, strict=False):
            self.pool.register(block, digest)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.free(self.tables.pop(index))

    @rule(count=st.integers(0, 9))
    def share_prefix(self, count: int) -> None:
        found = self.pool.lookup(self.digests[:count])
        before = self.pool.num_free
        taken = self.pool.num_free_among(found)
        self.pool.share(found)
        assert self.pool.num_free == before - taken
        self.tables.append(found)

    @rule()
    def forget(self) -> None:
        self.pool.reset_prefix_cache()
        assert self.pool.lookup(self.digests) == []

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity(self.tables)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
