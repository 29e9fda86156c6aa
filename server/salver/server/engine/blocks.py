"""The pool of cache blocks: who owns which, which are free, which hold a known prefix.

Standard library only, so that its tests run in milliseconds. A block holds the keys
and values of `block_size` consecutive tokens. Block 0 is the null block: padding rows
write there and no sequence ever owns it; here it doubles as the sentinel of the free
list, a circular doubly linked list, so that taking, returning and reviving a block are
all O(1).

A freed block keeps its content and its digest until it is handed out again, so the
free list is at once the prefix cache's eviction order: least recently freed first.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

NULL_BLOCK = 0


class OutOfBlocks(Exception):
    """More blocks were asked for than are free. Nothing was taken."""


class IntegrityError(AssertionError):
    """The pool's books do not agree with its owners: a bug in the engine."""


def root_digest(cache_salt: str, adapter: str = "") -> bytes:
    """Where a hash chain starts: requests share prefixes only under one salt and adapter."""
    return blake2b(f"{adapter}\0{cache_salt}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Names a block by all tokens up to its end: a hash of its parent's digest and its own tokens."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out blocks 1 .. num_blocks - 1, counts their owners, and finds cached prefixes."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and at least one more, not {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_free = num_blocks - 1
        self._ref_counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._next = [*range(1, num_blocks), NULL_BLOCK]
        self._previous = [num_blocks - 1, *range(num_blocks - 1)]

    @property
    def num_used(self) -> int:
        """Blocks that some sequence owns."""
        return self.num_blocks - 1 - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, the least recently freed first; they forget their content.

        Raises OutOfBlocks, and takes none, when fewer are free.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks asked for, {self.num_free} free")
        taken = []
        for _ in range(count):
            block = self._next[NULL_BLOCK]
            self._unlink(block)
            self._forget(block)
            self._ref_counts[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Adds an owner to each block, reviving those that are free."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                self._unlink(block)
            self._ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Takes one owner from each block of a table.

        In reverse, so that a prefix's end is evicted before its beginning.
        """
        for block in reversed(blocks):
            if self._ref_counts[block] <= 0:
                raise IntegrityError(f"block {block} is freed by nobody's owner")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._append(block)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Returns blocks that were taken and hold nothing of worth: the next to be taken again."""
        for block in reversed(blocks):
            if self._ref_counts[block] != 1 or self._digests[block] is not None:
                raise IntegrityError(f"block {block} has other owners or is cached")
            self._ref_counts[block] = 0
            self._prepend(block)

    def lookup(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix; they are not owned until shared."""
        found: list[int] = []
        if not self.enable_prefix_caching:
            return found
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these are in the free list: sharing them takes so many from it."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def register(self, block: int, digest: bytes) -> None:
        """Says that a block's tokens are all computed. The first block of a digest keeps it."""
        if self.enable_prefix_caching and self._digests[block] is None and digest not in self._by_digest:
            self._digests[block] = digest
            self._by_digest[digest] = block

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix (the weights changed)."""
        self._by_digest.clear()
        self._digests = [None] * self.num_blocks

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises IntegrityError unless every block is free or owned by exactly these tables."""
        owners: Counter[int] = Counter()
        for table in tables:
            owners.update(table)
        if owners[NULL_BLOCK]:
            raise IntegrityError("a sequence owns the null block")
        free: set[int] = set()
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            if block in free:
                raise IntegrityError(f"block {block} is twice in the free list")
            free.add(block)
            block = self._next[block]
        if len(free) != self.num_free:
            raise IntegrityError(f"{len(free)} blocks in the free list, {self.num_free} counted")
        for block in range(1, self.num_blocks):
            if owners[block] != self._ref_counts[block]:
                raise IntegrityError(
                    f"block {block}: {owners[block]} owners, {self._ref_counts[block]} counted"
                )
            if (block in free) != (self._ref_counts[block] == 0):
                raise IntegrityError(f"block {block} is lost: neither free nor owned, or both")
        for digest, block in self._by_digest.items():
            if self._digests[block] != digest:
                raise IntegrityError(f"block {block} is cached under a digest that is not its own")

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1

    def _append(self, block: int) -> None:
        last = self._previous[NULL_BLOCK]
        self._next[last], self._previous[block] = block, last
        self._next[block], self._previous[NULL_BLOCK] = NULL_BLOCK, block
        self.num_free += 1

    def _prepend(self, block: int) -> None:
        first = self._next[NULL_BLOCK]
        self._previous[first], self._next[block] = block, first
        self._next[NULL_BLOCK], self._previous[block] = block, NULL_BLOCK
        self.num_free += 1

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[block] = None
