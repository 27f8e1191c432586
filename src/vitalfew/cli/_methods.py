"""What is built, and where it comes from."""

from __future__ import annotations

METHODS: list[dict[str, str]] = [
    {
        "job": "embeddings",
        "method": "fused rows",
        "does": "updates only the rows a batch touches, inside backward, without building a gradient",
        "use": "vitalfew train; EmbeddingBags; wrap(model)",
        "after": "FBGEMM's table-batched embeddings; rowwise Adagrad: Duchi et al. 2011, Mudigere et al. 2021",
        "card": "docs/methods/fused-rows.md",
    },
    {
        "job": "embeddings",
        "method": "half-width rows",
        "does": "keeps rows as bfloat16 or float16 with stochastic rounding, state in float32",
        "use": "vitalfew train --storage bfloat16; EmbeddingBags(dtype=)",
        "after": "Gupta et al. 2015 (stochastic rounding)",
        "card": "docs/methods/half-width-rows.md",
    },
    {
        "job": "embeddings",
        "method": "rows over tiers",
        "does": "keeps tables on a disk and the rows that are needed soon in a hard budget of memory, to the same bits",
        "use": "vitalfew train --memory 2GiB --store FOLDER; TieredEmbeddings",
        "after": "the store under FAE, Hotline, Slipstream and Bagpipe; ours",
        "card": "docs/methods/rows-over-tiers.md",
    },
    {
        "job": "embeddings",
        "method": "look-ahead",
        "does": "reads ahead of the loop, brings rows in before their turn, and keeps those needed soonest",
        "use": "vitalfew look --budget 10% --policies lookahead; Prefetch",
        "after": "Bagpipe (Agarwal et al. 2023); Belady 1966",
        "card": "docs/methods/look-ahead.md",
    },
    {
        "job": "embeddings",
        "method": "rows over workers",
        "does": "spreads rows over processes, each row with one owner; what can travel beside the computation does",
        "use": "torchrun; ShardedEmbeddings, ShardedPrefetch",
        "after": "Bagpipe (Agarwal et al. 2023)",
        "card": "docs/methods/rows-over-workers.md",
    },
]
