"""log softmax of a large vocabulary at the tokens that are asked for, without all logits at once.

Letters: B rows, K positions, D width, V vocabulary, S shards of the vocabulary, c chunks.
"""

import math

import jax
import jax.numpy as jnp

from starflow2_jax.nn import layers, partition

MOST_LOGITS_BYTES = 2**26
"""Of the logits that are there at a time, on one device, where the vocabulary can be cut so."""


def vocabulary_chunks(positions: int, vocabulary: int, itemsize: int, most: int) -> int:
    """The fewest equal chunks of a vocabulary whose logits at the positions take `most` bytes.

    A vocabulary without a divisor that is large enough is cut as finely as its divisors allow.
    """
    least = math.ceil(positions * vocabulary * itemsize / most)
    divisors = [n for n in range(1, math.isqrt(vocabulary) + 1) if vocabulary % n == 0]
    divisors += [vocabulary // n for n in reversed(divisors)]
    return next((n for n in divisors if n >= least), vocabulary)


def token_log_prob(
    y: jax.Array, head: jax.Array, tokens: jax.Array, most: int = MOST_LOGITS_BYTES
) -> tuple[jax.Array, jax.Array]:
    """log softmax(y head^T) at one token for each position.

    The vocabulary is run through in chunks, each of which is cut over the mesh like the whole; the
    backward pass computes a chunk's logits again.

    Args:
        y: [B, K, D], in the compute dtype.
        head: [V, D], of logical axes vocab, embed.
        tokens: int32 [B, K].
        most: bytes of logits at a time, on one device.

    Returns:
        log p of the tokens, and the log partition (logsumexp of the logits), both [B, K], at least
        float32; nats.
    """
    dtype, wide = y.dtype, layers.at_least_float32(y.dtype)
    vocabulary, width = head.shape
    shards = partition.axis_extent("vocab")
    shards = shards if vocabulary % shards == 0 else 1
    spread = partition.axis_extent("batch") * partition.axis_extent("length")
    chunks = vocabulary_chunks(
        math.ceil(math.prod(tokens.shape) / spread), vocabulary // shards, wide.itemsize, most
    )
    # A chunk is the same part of each device's share of the vocabulary.
    cut = lambda a: a.reshape(shards, chunks, -1, *a.shape[1:]).swapaxes(0, 1)
    table = partition.constrain(cut(head.astype(dtype)), (None, "vocab", None, "embed"))
    ids = cut(jnp.arange(vocabulary, dtype=jnp.int32))

    def chunk(y: jax.Array, table: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        table = partition.constrain(table, ("vocab", None, None))  # [S, V / (S c), D]
        logits = jnp.einsum("bkd,svd->bksv", y.astype(dtype), table, preferred_element_type=wide)
        logits = partition.constrain(logits, ("batch", "length", "vocab", None))
        chosen = jnp.where(ids == tokens[..., None, None], logits, 0.0).sum((-2, -1))
        return chosen, jax.nn.logsumexp(logits, axis=(-2, -1))

    if chunks == 1:
        chosen, partition_of = chunk(y, table[0], ids[0])
        return chosen - partition_of, partition_of
    again = jax.checkpoint(chunk, prevent_cse=False)
    y = y.astype(wide)  # in which the chunks' gradients are added up
    _, (chosen, partitions) = jax.lax.scan(lambda _, xs: (None, again(y, *xs)), None, (table, ids))
    partition_of = jax.nn.logsumexp(partitions, axis=0)
    return chosen.sum(0) - partition_of, partition_of
