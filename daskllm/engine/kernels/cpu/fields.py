"""What is where in the arguments of kernels, for their callers and for the compiled code that reads them."""

from __future__ import annotations

LINE = 8
"""int64 per cache line. Each phase counts in a line of its own: items taken, threads arrived, all there."""

PHASES = ("norm", "qkv", "rope", "attention", "o", "norm", "mlp", "down")
"""What the team does in each layer, in order."""

# Fields of a step's arguments. What ends in _AT is an address.
(
    TEAM_AT, TABLE_AT, COUNTERS_AT, CLOCK_AT, TIMES_AT, LAYERS, ROWS_, TILES, CHUNKS,
    RESIDUAL_AT, NORMED_AT, QKV_AT, Q_AT, MIXED_AT, INNER_AT, DELTA_AT,
    POSITIONS_AT, SLOTS_AT, TABLES_AT, TILES_AT, WIDTH, COS_AT, SIN_AT, ANGLES,
    HIDDEN, HEADS, KV_HEADS, SIZE, PADDED, INNER, BLOCKS, EPS, SCALE, LAYER_NORM, ACTIVATION, GATED, YIELD_AT,
    FIELDS,
) = range(38)  # fmt: skip

# Fields of a layer in the table. A product has four: panels, bias, places, number of panels.
(
    INPUT_NORM, INPUT_BIAS, QKV, QKV_1, QKV_2, QKV_3, Q_NORM, K_NORM, KEYS, VALUES, WINDOW,
    OUT, OUT_1, OUT_2, OUT_3, POST_NORM, POST_BIAS, MLP, MLP_1, MLP_2, MLP_3, DOWN, DOWN_1, DOWN_2, DOWN_3,
    LAYER_FIELDS,
) = range(26)  # fmt: skip

INT8_PHASES = ("norm", "qkv", "rope", "attention", "quantise", "o", "norm", "mlp", "activation", "down")
"""`PHASES` where weights are int8."""

# Fields of a step's arguments behind the others where weights are int8: a product's quantised inputs, the MLP
# before its activation.
INT8_AT, SCALES_AT, MINUS_AT, WIDE_AT, INT8_FIELDS = range(FIELDS, FIELDS + 5)


def padded_inputs(size: int) -> int:
    """Bytes of a row of so many inputs in eight bits."""
    return (size + 3) // 4 * 4


# Fields of the arguments that weights are laid out by, behind the counter of strips and their number.
FILL_TABLE, FILL_READ, FILL_BUFFER, FILL_STOP, FILL_DONE, FILL_FIELDS = range(2, 8)

# Fields of a strip: an open file, `IN_MEMORY` or `NOWHERE` (only its memory is to come), where in the file or
# in memory it begins, outputs, words of each, and where it goes.
WHICH_FILE, FROM, OUTPUTS, WORDS, TO, STRIP_FIELDS = range(6)
IN_MEMORY, NOWHERE = -1, -2
