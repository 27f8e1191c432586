"""Tables of what generating with fewer keys and values was measured to do; `figures.py` puts them into the pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vitalfew.report.figures import amount


def lines(*parts: str) -> str:
    """Return lines that end with a line end, as a place for figures holds them."""
    return "\n".join((*parts, ""))


def interval(found: Mapping[str, float], form: str) -> str:
    """Return a mean with its interval."""
    mean, low, high = (format(found[name], form) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def decode_table(body: Mapping[str, Any], machine: str) -> str:
    """Return the time of a step by shape and budget, beside full caches and the ceiling."""
    rows = []
    for at in body["results"]:
        outcome = "declined beforehand" if at["declined"] else "; ".join(at["missed"])
        cells = (
            f"{at['rows']} x {at['tokens']:,}",
            f"{at['share']:.0%}",
            *(f"{at[name]:.1f} ms" for name in ("dynamic ms", "static ms", "slots ms", "slots with noise ms")),
            f"{at['over dynamic']:.2f}x ({at['over dynamic, noise']:.2f}x)",
            f"{at['over static']:.2f}x ({at['over static, noise']:.2f}x)",
            f"{at['ceiling']:.2f}x",
            outcome,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return lines(
        f"Measured on {machine}, one thread; the best of the rounds. In brackets with Gumbel noise.",
        "",
        "| rows x tokens | kept | dynamic cache | static cache | slots | slots, noise | over dynamic | over static "
        "| by bytes, over static | misses |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --- |",
        *rows,
    )


def first_token_table(body: Mapping[str, Any], machine: str) -> str:
    """Return the time to the first token of each policy, times the full cache's."""
    ratios: dict[str, dict[int, float]] = {}
    for at in body["results"]:
        ratios.setdefault(at["policy"], {})[at["tokens"]] = at["ratio"]
    lengths = list(next(iter(ratios.values())))
    rows = [f"| {name} | " + " | ".join(f"{of[n]:.2f}x" for n in lengths) + " |" for name, of in ratios.items()]
    return lines(
        f"Measured on {machine}, one thread; the least of the rounds, times that of the full cache.",
        "",
        "| policy | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |",
        f"| --- |{' --: |' * len(lengths)}",
        *rows,
    )


def memory_table(body: Mapping[str, Any], machine: str) -> str:
    """Return what a long stream held."""
    at = body["results"]
    same = "as the formula says" if at["bytes held"] == at["formula"] else f"the formula says {at['formula']:,}"
    held, full, grown = (amount(max(0, at[name]), "B") for name in ("bytes held", "full cache", "grown after a fifth"))
    return lines(
        f"While {at['tokens']:,} tokens of essays went by, {at['prompt']:,} of them the prompt, {at['slots']:,} slots",
        f"held {held} after every call (counted; {same}). The full cache would hold {full}.",
        f"After a fifth of the stream the process grew by {grown} (measured on {machine}).",
    )


def quality_table(body: Mapping[str, Any], machine: str) -> str:
    """Return how far each policy is from the full cache at each budget, and paired differences."""
    arms = {arm: at for arm, at in body["results"].items() if arm != "full"}
    order = sorted(arms, key=lambda arm: (-float(arm.rpartition(" ")[2].rstrip("%")), arms[arm]["kl"]["mean"]))
    rows = [
        f"| {arm} | {interval(arms[arm]['kl'], '.4f')} | {interval(arms[arm]['added nll'], '+.4f')} "
        f"| {interval(arms[arm]['agreement'], '.3f')} |"
        for arm in order
    ]
    duels = [
        f"| {at['one']} less {at['other']} | {at['budget']:.0%} | {interval(at['one less other']['kl'], '+.4f')} "
        f"| {interval(at['one less other']['nll'], '+.4f')} |"
        for at in body["pairs"]
        if at["other"] not in ("recent", "random")
    ]
    short = body["short texts"]
    return lines(
        f"{body['model']}; {len(body['texts'])} texts (essays, meetings, news), {body['prompt']:,} tokens at once,",
        f"then {body['later']:,} one by one; nats per token, intervals of 95 % over the texts. Measured on {machine}.",
        "",
        "| cache | KL from full | added negative log-likelihood | same likeliest token |",
        "| --- | --: | --: | --: |",
        *rows,
        "",
        "Differences at the same budget, text by text; below zero the first policy is nearer to the full cache:",
        "",
        "| | budget | KL | negative log-likelihood |",
        "| --- | --: | --: | --: |",
        *duels,
        "",
        f"Of {short['passages']} LAMBADA passages, all below `min_length`, {short['same tokens']} went on as with the",
        "full cache, token by token.",
    )


NEAR = "rougeL to full's text"


def summaries_table(body: Mapping[str, Any], machine: str) -> str:
    """Return the ROUGE of summaries with each policy, beside the full cache's."""
    rows = [
        f"| {arm} | {at['rouge1']:.4f} | {at['rouge2']:.4f} | {at['rougeL']:.4f} | {at['rouge2 of full']:.2f} "
        f"| {interval(at['rouge2 less full'], '+.4f')} | {at[NEAR]:.2f} |"
        for arm, at in body["results"].items()
    ]
    return lines(
        f"{body['model']}; a sentence of at most {body['tokens']} tokens about {body['articles']} XSum articles each.",
        f"*told*: the instruction alone voted. Intervals of 95 % over the articles. Measured on {machine}.",
        "",
        "| cache | ROUGE-1 | ROUGE-2 | ROUGE-L | ROUGE-2, of full's | ROUGE-2 less full's | ROUGE-L to full's text |",
        "| --- | --: | --: | --: | --: | --: | --: |",
        *rows,
    )


def prompts_table(body: Mapping[str, Any], machine: str) -> str:
    """Return how alike answers are with a small arena, and how much smaller the cache is."""
    rows = [
        f"| {at['prompts']}, {at['new']} tokens | {at['policy']} "
        f"| {at['similarity']:.2f} ({at['similarity asked']:.2f}) | {at['same texts']} of {at['texts']} "
        f"| {at['use max']:.2f} ({at['use max asked']:.1f}) | {at['use mean']:.2f} ({at['use mean asked']:.1f}) |"
        for at in body["results"]
    ]
    start, recent, most = body["arena"]
    return lines(
        f"{body['model']}, greedy; {start} tokens of the start, {recent} latest ones, {most} in all. In brackets what",
        "OpenVINO GenAI's own tests ask of its eviction, whose similarity is of sentence embeddings; ours is ROUGE-L.",
        f"Measured on {machine}.",
        "",
        "| prompts | policy | similarity | same texts | largest cache, times fewer | mean, times fewer |",
        "| --- | --- | --: | --: | --: | --: |",
        *rows,
    )


CASES = ("unknown", "seen", "told")
SCORING = "scoring's share"


def needles_table(body: Mapping[str, Any], machine: str) -> str:
    """Return how many needles each policy found, by budget and by what was known of the question."""
    found = {at["arm"]: at for at in body["results"]}
    few = [arm.rpartition(", ")[::2] for arm in found if arm != "full"]
    names = list(dict.fromkeys(arm.rpartition(" ")[0] for arm, _ in few))
    budgets = list(dict.fromkeys(arm.rpartition(" ")[2] for arm, _ in few))

    def cell(arm: str) -> str:
        return f"{found[arm]['recall']:.2f}" if arm in found else "-"

    rows = [
        f"| {name} | " + " | ".join(cell(f"{name} {b}, {case}") for b in budgets for case in CASES) + " |"
        for name in names
    ]
    full, widest = found["full"], max((at["high"] - at["low"]) / 2 for at in found.values())
    heads = " | ".join(f"{b}, {case}" for b in budgets for case in CASES)
    return lines(
        f"{body['model']}; share of the needles found, of {full['samples']} prompts of {', '.join(full['by cell'])}.",
        f"The full cache found {full['recall']:.2f}. Intervals of 95 % reach at most {widest:.2f} to either side.",
        "*unknown*: the question came after the choice; *seen*: it ended the prompt; *told*: it alone voted.",
        "",
        f"| policy | {heads} |",
        f"| --- |{' --: |' * (len(budgets) * len(CASES))}",
        *rows,
        "",
        f"Measured on {machine}.",
    )


def peers_table(body: Mapping[str, Any], machine: str) -> str:
    """Return how kvpress compares at equal bytes, part by part; parts that were not run are left out."""
    parts, out = body["parts"], []
    if quality := parts.get("quality"):
        out += [
            f"KL from each one's own full cache, over {len(quality['texts'])} texts; differences text by text:",
            "",
            "| ours | kvpress | KL, ours | KL, kvpress | ours less theirs |",
            "| --- | --- | --: | --: | --: |",
            *(
                f"| {at['ours']} | {at['kvpress']} | {at['kl']:.4f} | {at['kvpress kl']:.4f} "
                f"| {interval(at['kl less theirs'], '+.4f')} |"
                for at in quality["table"]
            ),
            "",
        ]
    if padded := parts.get("padded"):
        out += [
            "A short text alone, and left-padded beside a longer one (KL from the full cache of the text alone):",
            "",
            "| | alone | in a batch |",
            "| --- | --: | --: |",
            *(
                f"| {name} | {padded[side]['alone']['kl']:.4f} | {padded[side]['in a batch']['kl']:.4f} |"
                for name, side in (("SnapKV, ours", "ours"), ("SnapKV, kvpress", "kvpress"))
            ),
            "",
        ]
    if needles := parts.get("needles"):
        out += [
            f"Needles found, of {needles['samples']}:",
            "",
            "| | share |",
            "| --- | --: |",
            *(f"| {arm} | {recall:.2f} |" for arm, recall in needles["recall"].items()),
            "",
        ]
    if speed := parts.get("speed"):
        over = speed["over its full cache"]
        out += [
            f"Speed of a decode step over each one's own dynamic full cache, {speed['rows']} rows of "
            f"{speed['tokens']:,} tokens, one thread:",
            "",
            "| | ours | kvpress |",
            "| --- | --: | --: |",
            *(
                f"| {arm} | {over['ours'][arm]:.2f}x | {over['kvpress'][arm]:.2f}x |"
                for arm in over["ours"]
                if arm != "full"
            ),
            "",
        ]
    versions = ", ".join(f"{name} {version}" for name, version in body["peer"].items())
    return lines(f"{body['model']}; equal bytes, {versions}. Measured on {machine}.", "", *out[:-1])


def serve_table(body: Mapping[str, Any], machine: str) -> str:
    """Return what the server did with the same memory for the full cache and for a share of it."""
    setup, pairs = body["setup"], body["results"]
    shown = ("tokens per second", "rows at once, mean", "rows at once, most", "seconds to the first token, median")

    def mean(arm: int, name: str) -> float:
        return sum(pair[arm][name] for pair in pairs) / len(pairs)

    share, memory = pairs[0][1]["budget"], pairs[0][0]["memory"]
    rows = [f"| {name} | {mean(0, name):.1f} | {mean(1, name):.1f} |" for name in shown]
    ratios = body["ratios"]["tokens per second"]
    return lines(
        f"{setup['clients']} streaming clients; prompts of {setup['shortest']:,} to {setup['longest']:,} tokens",
        f"and {setup['new']} more each; {amount(memory, 'B')} for keys and values, eight of the longest in full;",
        f"means; turns taken: {len(pairs)}.",
        f"Measured on {machine}.",
        "",
        f"| | full cache | {share:.0%}, {setup['policy']} |",
        "| --- | --: | --: |",
        *rows,
        "",
        f"Tokens per second, times the full cache's: {', '.join(f'{ratio:.2f}' for ratio in ratios)}.",
    )


def quant_table(body: Mapping[str, Any], machine: str) -> str:
    """Return what coded slots cost and save beside the same policy uncoded."""
    rows = [
        f"| {at['policy']} {at['share']:.0%} | {'-' if at['codec'] == 'none' else at['codec']} | {at['kl']:.4f} "
        f"| {at['kl added']:+.4f} | {at['top-1']:.3f} | {amount(at['bytes'], 'B')} | {at['full bf16 / bytes']:.2f}x "
        f"| {at['step ms']:.1f} ms | {'declined' if at['declined'] else 'missed' if at['missed'] else ''} |"
        for at in body["results"]
    ]
    return lines(
        f"SmolLM2-135M in float32, essays, {body['results'][0]['tokens']:,} tokens one by one; measured on {machine}, "
        "one thread.",
        "*Fewer* is against a full cache in bfloat16.",
        "",
        "| policy | codec | KL from full | added by the codec | same likeliest token | bytes | fewer | step | |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --- |",
        *rows,
    )


def prefix_table(body: Mapping[str, Any], machine: str) -> str:
    """Return how long questions behind a prefix wait, beside reading the text again."""
    rows = [
        f"| {at['tokens']:,} | {at['rows']} | {'-' if at['codec'] == 'none' else at['codec']} | {at['fork s']:.2f} s "
        f"| {at['again s']:.2f} s | {at['ratio']:.1%} | {at['tokens read']:.1%} | {amount(at['prefix bytes'], 'B')} "
        f"| {at['load s']:.2f} s |"
        for at in body["results"]
    ]
    return lines(
        f"SmolLM2-135M in float32, half of the text kept, questions of {body['results'][0]['question']} tokens; time",
        f"for each question until its first token. Measured on {machine}, one thread.",
        "",
        "| text | questions | codec | behind the prefix | text read again | share | share of tokens | bytes | load |",
        "| --: | --: | --- | --: | --: | --: | --: | --: | --: |",
        *rows,
    )


def gpu_table(body: Mapping[str, Any], machine: str) -> str:
    """Return what a GPU took for steps and prompts, and the batch that a memory holds."""
    found = body["results"]
    out = [f"Measured on {machine}; a copy moves {found['copy'] / 1e9:,.0f} GB/s. Both sides run in CUDA graphs.", ""]
    if kernels := found.get("kernels"):
        off = sum(bool(at["missed"]) for at in kernels)
        out += [f"Kernels against plain float32 torch: {len(kernels)} cases, {off} off.", ""]
    if steps := found.get("model"):
        out += [
            "| model | rows x tokens | kept | slots | static cache | faster | at most |",
            "| --- | --- | --: | --: | --: | --: | --: |",
            *(
                f"| {at['model']} | {at['rows']} x {at['tokens']:,} | {at['share']:.0%} | {at['slots ms']:.2f} ms "
                + (f"| {at['static ms']:.2f} ms | {at['over static']:.2f}x " if "static ms" in at else "| - | - ")
                + f"| {at['ceiling']:.2f}x |"
                for at in steps
            ),
            "",
        ]
    if prompts := found.get("prompt"):
        shares = ", ".join(f"{at['policy']} {at[SCORING]:.0%}" for at in prompts)
        out += [f"Share of a prompt of {prompts[0]['tokens']:,} tokens that scoring takes: {shares}.", ""]
    if batches := found.get("memory"):
        held = ", ".join(f"{at['largest batch']} ({at['share']:.0%})" for at in batches)
        bytes_, tokens = amount(batches[0]["bytes"], "B"), batches[0]["tokens"]
        out += [f"Largest batch of {tokens:,} tokens in {bytes_} for keys and values, by the share kept: {held}.", ""]
    return lines(*out[:-1])


TABLES: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "decode": decode_table,
    "first_token": first_token_table,
    "generate_gpu": gpu_table,
    "generate_memory": memory_table,
    "generate_quality": quality_table,
    "generate_serve": serve_table,
    "needles": needles_table,
    "openvino_prompts": prompts_table,
    "peers": peers_table,
    "prefix": prefix_table,
    "quant": quant_table,
    "summaries": summaries_table,
}
