"""Measures what the conversion cost: SQNR from the receipts, perplexity and divergence of release against source.

    SQNR        = 10 log10(sum w^2 / sum (w - w_hat)^2) over the weights named; about 19 dB is the format's limit
    perplexity  = exp(mean negative log-likelihood per scored token) over sliding windows, each token scored once
    paired      = perplexity of the release / that of the source, token by token: what the text itself adds to the error of
                  either cancels out; and how often both would pick the same token: perplexity alone has called damaged models good
    divergence  = mean over tokens of KL(source || release) of the next-token distributions
    drafts      = how often MTP layer k would have drafted the token that the model itself picks (teacher forcing)

Errors are one standard error, tokens taken as independent of each other.

Source and release see the same windows of the same text in the same process. A model that would not fit in
`evaluation.memory_gb` is not measured in process, and the result says so in place of a figure. With `evaluation.via=vllm`
the same windows go to a server instead (stages/serving/score.py): perplexity on the engine that serves the release, paired
with that of the source, for models of any size; divergence and drafts need all logits and are then left out.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from kernels.decibels import decibels
from stages.checkpoint.files import human_bytes, read_json, sha256_file, write_json
from stages.dialects.config import text_part
from stages.dialects.roles import layer_of, projection_of, role_in_layer
from stages.errors import UserError, exit_with_one_line
from stages.planning.record import read_plan
from stages.receipts import read_receipts
from stages.records import MatrixSums, Plan, Receipt
from stages.release import measured_release
from stages.schemes.architectures import architecture_of
from stages.settings import Settings, load, scoring, stage_parser, text_path
from stages.settings.schema import FEWEST_TOKENS
from stages.sources.listing import check_source
from stages.tokenizer import TOKENIZER, read_tokenizer

BYTES = {"float32": 4, "bfloat16": 2}


def _figure(signal: float, error: float) -> float | None:
    """SQNR in dB as JSON can hold it; None for an exact conversion, whose ratio has no finite value."""
    return round(max(-300.0, decibels(signal, error)), 4) if error else None


def _total(sums: list[MatrixSums]) -> tuple[float, float]:
    return math.fsum(entry.signal for entry in sums), math.fsum(entry.error for entry in sums)


def sqnr(receipts: dict[str, Receipt]) -> dict:
    """SQNR per tensor, per expert, per layer, per layer of a role's projection and overall, from the receipts' exact sums (no second pass)."""
    quantized: dict[str, list[MatrixSums]] = {}
    for receipt in receipts.values():
        for name, sums in receipt["quantized"].items():
            quantized.setdefault(name, []).extend(sums)  # the experts of a layer may lie in several shards
    for sums in quantized.values():
        sums.sort(key=lambda entry: entry.expert or 0)
    tensors = {name: {"layer": layer_of(name), "projection": projection_of(name), "sqnr_db": _figure(*_total(sums)),
                      "experts_db": [_figure(entry.signal, entry.error) for entry in sums]}
               for name, sums in sorted(quantized.items(), key=lambda item: (layer_of(item[0]) or 0, item[0]))}
    by_layer: dict[int | None, list[MatrixSums]] = {}
    alike: dict[tuple[str, str, int], list[MatrixSums]] = {}
    for name, sums in quantized.items():
        layer = layer_of(name)
        by_layer.setdefault(layer, []).extend(sums)
        if layer is not None:
            alike.setdefault((role_in_layer(name), projection_of(name) or "weight", layer), []).extend(sums)
    every = [entry for sums in quantized.values() for entry in sums]
    figures = [figure for entry in tensors.values() for figure in entry["experts_db"] if figure is not None]
    return {
        "overall_db": _figure(*_total(every)) if every else None,
        "matrices": len(every),
        "worst_matrix_db": min(figures, default=None),
        "best_matrix_db": max(figures, default=None),
        "layers_db": {str(layer): _figure(*_total(sums)) for layer, sums in sorted(by_layer.items())},
        "projections": [{"role": role, "projection": projection, "layer": layer, "matrices": len(sums), "sqnr_db": _figure(*_total(sums))}
                        for (role, projection, layer), sums in sorted(alike.items())],
        "tensors": tensors,
    }


def windows(token_count: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first scored token) of each window; every token that has one before it in its window is scored exactly once.

    With a stride below the context those are all but the text's first. With a stride of the whole context, windows do not overlap, as usual for
    published perplexities: the first token of each has nothing to be predicted from and is not scored.
    The last one begins earlier where it would have fewer than FEWEST_TOKENS.
    """
    result, scored, begin = [], 1, 0
    while scored < token_count:
        begin = min(begin, max(0, token_count - min(FEWEST_TOKENS, context)))
        end = min(begin + context, token_count)
        result.append((begin, end, max(scored, begin + 1)))
        scored = end
        begin += stride
    return result


def first_token(directory: Path) -> int | None:
    """Id of the BOS token of a checkpoint or release, None where its config.json names none."""
    first = text_part(read_json(Path(directory) / "config.json", "assemble_release")).get("bos_token_id")
    return first if isinstance(first, int) else None


def tokens_of(text: str, directory: Path, maximum: int | None) -> torch.Tensor:
    """Token ids [n] of a text under the checkpoint's own tokenizer.json, beginning with its BOS token if it has one.

    UserError for a tokenizer.json that is damaged.
    """
    ids = read_tokenizer(directory).encode(text).ids
    first = first_token(directory)
    if first is not None and ids[:1] != [first]:
        ids = [first, *ids]
    return torch.tensor(ids[:maximum], dtype=torch.int64)


class Scorer:
    """One model in memory: log-probabilities and draft picks over windows of tokens."""

    def __init__(self, directory: Path, dtype: str):
        from stages.models import step37

        self.model, self.drafts, self.loading = step37.load(directory, getattr(torch, dtype))
        self._residual = None
        text = self.model.model.language_model
        text.layers[-1].register_forward_hook(self._keep)
        self._embed = text.embed_tokens

    def _keep(self, module, inputs, output) -> None:
        self._residual = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """tokens [n] -> (log-probabilities float32 [n, vocabulary], per draft layer its picks [n - 1 - k])."""
        rows = tokens.unsqueeze(0)
        logits = self.model(input_ids=rows, use_cache=False).logits[0].float()
        drafts = []
        if self.drafts is not None:
            drafts = [d[0].argmax(-1) for d in self.drafts(self._embed(rows), self._residual)]
        return logits.log_softmax(-1), drafts


def _perplexity(values: list[torch.Tensor]) -> dict:
    """Perplexity and its standard error from pieces of the scored tokens' log-probabilities, in nats."""
    loss = -torch.cat(values).double()
    mean = loss.mean().item()
    return {"perplexity": math.exp(mean), "standard_error": math.exp(mean) * _standard_error(loss), "nats_per_token": mean,
            "tokens": len(loss)}


def _standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean of values [n]; 0 for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _paired(source: torch.Tensor, release: torch.Tensor, same: torch.Tensor) -> dict:
    """The release against the source, from both log-probabilities float64 [n] of the same tokens and whether both models' likeliest token was
    the same, [n]. The errors are those of differences: far smaller than those of the two perplexities, which mostly share their text's."""
    change = source - release
    ratio, error, share = math.exp(change.mean().item()), _standard_error(change), same.double().mean().item()
    return {"perplexity_ratio": ratio, "standard_error": ratio * error, "standard_error_nats": error,
            "median_absolute_change_nats": change.abs().median().item(),
            "same_top_token": share, "same_top_token_standard_error": math.sqrt(share * (1 - share) / len(same))}


def measure(source: Path | None, release: Path, tokens: torch.Tensor, context: int, stride: int, dtype: str) -> dict:
    """Perplexity of both models, their divergence and their drafts' agreement over the same windows."""
    scorers = {"release": Scorer(release, dtype)}
    if source is not None:
        scorers["source"] = Scorer(source, dtype)
    likelihoods = {name: [] for name in scorers}
    agreement = {name: {} for name in scorers}
    divergences, same = [], []
    for begin, end, scored in windows(len(tokens), context, stride):
        part = tokens[begin:end]
        first = scored - begin - 1  # position that predicts the first scored token
        found = {}
        for name, scorer in scorers.items():
            log_probabilities, drafts = scorer(part)
            found[name] = log_probabilities[first:-1]
            likelihoods[name].append(found[name].gather(1, part[scored - begin:, None])[:, 0])
            picks = log_probabilities.argmax(-1)
            for k, draft in enumerate(drafts):  # draft k at p and the model at p + 1 + k predict the same token
                hits = (draft[max(first - 1 - k, 0):] == picks[1 + k:][max(first - 1 - k, 0):]).float()
                agreement[name].setdefault(k, []).append(hits)
        if source is not None:
            p, q = found["source"], found["release"]
            divergences.append((p.exp() * (p - q)).sum(-1).double())
            same.append(p.argmax(-1) == q.argmax(-1))
    result = {name: {**_perplexity(values), "loading": scorers[name].loading,
                     "draft_agreement": [torch.cat(agreement[name][k]).mean().item() for k in agreement[name]]}
              for name, values in likelihoods.items()}
    if source is not None:
        kl = torch.cat(divergences)
        result["divergence"] = {
            "mean_kl_nats": kl.mean().item(), "standard_error_nats": _standard_error(kl), "median_kl_nats": kl.median().item(),
            "99th_percentile_kl_nats": kl.quantile(0.99).item(), "99.9th_percentile_kl_nats": kl.quantile(0.999).item(),
            "maximum_kl_nats": kl.max().item()}
        result["paired"] = _paired(*(torch.cat(likelihoods[name]).double() for name in ("source", "release")), torch.cat(same))
    return result


def measure_served(settings: Settings, tokens: torch.Tensor) -> dict:
    """Perplexity of the release and, where it lies on this machine, of the source, each behind a server of its own, and one against the other."""
    from stages.serving.launcher import server
    from stages.serving.score import scored_tokens

    evaluation, found, scored = settings.evaluation, {}, {}
    directories = {"release": settings.run_directory / "release"}
    if settings.source.path and settings.serving.kind == "vllm":
        directories["source"] = Path(settings.source.path)
    for name, directory in directories.items():
        with server(settings, directory) as running:
            scored[name] = scored_tokens(running, tokens, windows(len(tokens), evaluation.context, evaluation.stride))
            found[name] = {**_perplexity([scored[name][0]]), "engine": running.facts}
    if "source" in scored:
        (before, picked), (after, picks) = scored["source"], scored["release"]
        found["paired"] = _paired(before, after, picked == picks)
    return found


def _not_measured(settings: Settings, plan: Plan) -> str | None:
    """Why perplexity cannot be measured with these settings; None where it can."""
    evaluation, with_source = settings.evaluation, bool(settings.source.path)
    weights = sum(math.prod(entry["matrix"] or entry["shape"]) for entry in plan["tensors"].values() if not entry["belongs_to"])
    needed = weights * BYTES[evaluation.dtype] * (4 if with_source else 2)  # state beside model; two models at once
    if evaluation.via == "process" and plan["architecture"] not in architecture_of(plan["architecture"]).in_process:
        return f"{plan['architecture']} does not run in process here: measure perplexity through a server (evaluation.via=vllm)"
    if evaluation.via == "process" and needed > evaluation.memory_gb * 1e9:
        return (f"{'source and release' if with_source else 'the release'} in {evaluation.dtype} and what they are loaded from need about "
                f"{human_bytes(needed)}, which exceed evaluation.memory_gb={evaluation.memory_gb:g}: measure perplexity through a server "
                "(evaluation.via=vllm)")
    if not (settings.run_directory / "release" / TOKENIZER).exists():
        return f"the checkpoint has no {TOKENIZER}, by which a text becomes tokens"
    return None


def perplexity(settings: Settings, plan: Plan) -> dict:
    """The content of perplexity.json; reasons stand in place of figures that were not measured."""
    evaluation = settings.evaluation
    result = {"settings": scoring(evaluation)}
    if why := _not_measured(settings, plan):
        return result | {"not_measured": why}
    source = Path(settings.source.path) if settings.source.path else None
    release, path = settings.run_directory / "release", text_path(settings)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    tokens = tokens_of(text, release, evaluation.maximum_tokens)
    if len(tokens) < FEWEST_TOKENS:
        raise UserError(f"{path}: {len(tokens)} tokens to score, too few for a figure; give a longer evaluation.text or evaluation.maximum_tokens, "
                        f"at least {FEWEST_TOKENS}")
    result["text"] = {"name": path.name, "sha256": sha256_file(path), "tokens": len(tokens),
                      "bytes": len(text.encode()), "begins_with_bos": tokens[0].item() == first_token(release)}
    if source is None or (evaluation.via == "vllm" and settings.serving.kind == "endpoint"):
        result["source_not_measured"] = ("the endpoint serves the release only" if source else
                                         "the source's shards are temporary, gone once they are converted: a local copy (source=local) would be measured, too")
    compared = "source_not_measured" not in result
    if compared:
        check_source(settings)
    if evaluation.via == "vllm":
        result |= measure_served(settings, tokens)
    else:
        result |= measure(source, release, tokens, evaluation.context, evaluation.stride, evaluation.dtype)
    if compared:
        check_source(settings)  # it could have changed meanwhile
    return result


def run(settings: Settings) -> dict:
    """Writes sqnr.json and perplexity.json, which name the release that they are of."""
    plan = read_plan(settings)
    release = {"manifest_sha256": measured_release(settings)}
    noise = release | sqnr(read_receipts(settings, plan))
    quality = release | perplexity(settings, plan)
    write_json(settings.run_directory / "sqnr.json", noise)
    write_json(settings.run_directory / "perplexity.json", quality)
    _print_results(noise, quality)
    return quality


def _print_results(noise: dict, quality: dict) -> None:
    """sqnr.json and perplexity.json in a few lines."""
    print(f"SQNR {noise['overall_db']} dB over {noise['matrices']} matrices (worst {noise['worst_matrix_db']} dB)"
          if noise["overall_db"] is not None else f"{noise['matrices']} matrices are exact")
    if "not_measured" in quality:
        print(f"perplexity not measured: {quality['not_measured']}")
    for name in ("source", "release"):
        if name in quality:
            row = quality[name]
            print(f"{name}: perplexity {row['perplexity']:.4f} +- {row['standard_error']:.4f} (standard error) over {row['tokens']} tokens"
                  + (f", {row['loading']['missing']} missing and {row['loading']['unexpected']} unexpected tensors, drafts "
                     "agree " + " ".join(f"{value:.3f}" for value in row["draft_agreement"]) if "loading" in row else ""))
    if "source_not_measured" in quality:
        print(f"source not measured: {quality['source_not_measured']}")
    if "paired" in quality:
        print("release against source: perplexity ratio {perplexity_ratio:.5f} +- {standard_error:.5f}, same top token {same_top_token:.4f}".format(
            **quality["paired"]))
    if "divergence" in quality:
        print("divergence: mean KL {mean_kl_nats:.5f} +- {standard_error_nats:.5f} nats".format(**quality["divergence"]))


@exit_with_one_line
def main() -> None:
    """Command line of the stage."""
    run(load(stage_parser(__doc__).parse_args().overrides))


if __name__ == "__main__":
    main()
