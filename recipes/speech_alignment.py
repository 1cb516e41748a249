r"""Find the cross-attention heads of a speech model that align words with time.

Heads are ranked by how well the order of the words explains their attention, and compared with the
alignment heads that the model's generation config publishes:

    python recipes/speech_alignment.py --model openai/whisper-tiny.en --audio speech.wav
    python recipes/speech_alignment.py --model FOLDER --audio speech.wav --text "The spoken text." \
        --words words.csv --out runs/speech

``--words`` is a table of known word starts (columns ``word`` and ``start_s``, in order), which adds
the error of each head in seconds. Without ``--model``, a tiny random Whisper and a synthetic sound
are used, which show how the recipe runs but have learned nothing.
"""

from __future__ import annotations

import json
import re
import wave
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

import xmodal_interp as xi
from xmodal_interp import evaluation, figures


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a Whisper")] = None,
    audio: Annotated[Path | None, typer.Option(help="16-bit WAV of at most 30 seconds")] = None,
    text: Annotated[str | None, typer.Option(help="The spoken text; default: transcribed")] = None,
    words: Annotated[Path | None, typer.Option(help="CSV of known word starts")] = None,
    heads: Annotated[str | None, typer.Option(help="Published heads: [[layer, head], ...]")] = None,
    out: Annotated[Path, typer.Option(help="Output folder")] = Path("runs/speech"),
) -> None:
    """Rank the heads, compare them with the published ones, and write a table and two figures."""
    if model is not None and audio is None:
        raise typer.BadParameter("--model requires --audio.")
    whisper, processor = tiny_whisper() if model is None else loaded(model)
    if model is None and text is None:
        text = "a sound that rises"
    rate = processor.feature_extractor.sampling_rate
    sound = read_wav(audio, rate) if audio else np.sin(np.linspace(0, 60, 2 * rate) ** 2)
    duration = len(sound) / rate
    if duration > processor.feature_extractor.chunk_length:
        raise typer.BadParameter(
            f"--audio must be at most {processor.feature_extractor.chunk_length} seconds long; got "
            f"{duration:.1f} seconds."
        )
    text, encoded, calls = recorded(whisper, processor, sound, text)
    typer.echo(f"{duration:.2f} seconds: {text.strip()}")

    tokens, names = word_tokens(text, encoded)
    rows = np.arange(tokens[0] - 1, encoded.input_ids.shape[1] - 1)  # each predicts the next token
    frame = processor.feature_extractor.chunk_length / whisper.config.max_source_positions
    n_keys = int(np.ceil(duration / frame))
    table = xi.time_alignment(calls, rows, n_keys=n_keys)
    pairs = list(zip(table["layer"], table["head"], strict=True))
    published = json.loads(heads) if heads else alignment_heads(whisper)
    published = [(layer, head) for layer, head in published]
    table["published"] = [pair in published for pair in pairs]
    starts = None if words is None else known_starts(names, words)

    def error(of: list[tuple[int, int]]) -> float:
        """Return the mean error of the word starts that these heads give, in seconds."""
        times = xi.token_times(calls, rows, of, n_keys=n_keys, seconds_per_key=frame)
        return float(np.nanmean(np.abs(times[tokens - tokens[0]] - starts)))

    if starts is not None:
        table["error_s"] = [error([pair]) for pair in pairs]
    table = table.sort_values("monotone_share", ascending=False)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "heads.csv", index=False)
    typer.echo(table.drop(columns=["tower", "kind"]).round(3).to_string(index=False))
    groups = {"most monotone": [pairs[i] for i in table.index[: len(published) or 8]]}
    if published:
        compare(table, published)
        groups["published"] = published
    if starts is not None:
        for title, of in groups.items():
            typer.echo(f"error of the {len(of)} {title} heads together: {error(of):.3f} s")

    maps = {
        (call.layer, head): call.probs([head], tokens - 1)[0, 0, :, :n_keys].numpy()
        for call in sorted(calls, key=lambda call: call.layer)
        if call.kind == "cross"
        for head in range(call.n_heads)
    }
    marks: dict[str, Any] = {"duration_s": n_keys * frame, "starts_s": starts}
    figures.time_panels(
        {named(pair): probs for pair, probs in maps.items()},
        names,
        columns=calls[-1].n_heads,
        emphasised=[named(pair) for pair in published],
        title="cross-attention of the row that predicts each word",
        note="Red titles: published alignment heads." if published else "",
        path=out / "heads.png",
        **marks,
    )
    first = groups["most monotone"][0]
    shown = {f"most monotone: {named(first)}": [first]}
    shown |= {f"mean of {len(published)} published heads": published} if published else {}
    figures.time_panels(
        {title: np.mean([maps[pair] for pair in of], 0) for title, of in shown.items()},
        names,
        title=f'"{text.strip()}"',
        path=out / "words.png",
        **marks,
    )
    typer.echo(f"Table and figures written to {out}")


def recorded(whisper: Any, processor: Any, sound: np.ndarray, text: str | None) -> Any:
    """Return the text, its tokens, and the calls of one run; transcribe without a text."""
    rate = processor.feature_extractor.sampling_rate
    features = processor(sound, sampling_rate=rate, return_tensors="pt").input_features
    with torch.no_grad():
        if text is None:
            text = processor.decode(whisper.generate(features)[0], skip_special_tokens=True)
        text = " " + text.strip()
        encoded = processor.tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        with xi.record(whisper) as recording:
            whisper(input_features=features, decoder_input_ids=encoded.input_ids)
    return text, encoded, recording.calls


def compare(table: pd.DataFrame, published: list[tuple[int, int]]) -> None:
    """Print how well the measures find the published heads."""
    scores = {"monotone_share": table["monotone_share"]}
    if "error_s" in table:
        scores["error_s (smallest first)"] = -table["error_s"]
    for name, score in scores.items():
        found = evaluation.known_heads(table.assign(score=score), published, "score").iloc[0]
        typer.echo(
            f"{name}: {found['n_found']:.0f} of the best {found['n_known']:.0f} of "
            f"{found['n_heads']:.0f} heads are published; AUC {found['auc']:.2f}, "
            f"p = {found['p_value']:.2g}"
        )


def alignment_heads(whisper: Any) -> list[Any]:
    """Return the published heads of the model for word times; empty if there are none."""
    return getattr(whisper.generation_config, "alignment_heads", None) or []


def named(pair: tuple[int, int]) -> str:
    """Return the title of a head's panel."""
    return f"layer {pair[0]}, head {pair[1]}"


def loaded(name: str) -> tuple[Any, Any]:
    """Return a model and its processor, by Hub id or folder."""
    return AutoModelForSpeechSeq2Seq.from_pretrained(name).eval(), AutoProcessor.from_pretrained(
        name
    )


def tiny_whisper() -> tuple[Any, Any]:
    """Return a tiny random Whisper with a tokenizer of bytes, which needs no download."""
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=letters, merges=[])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]}
    )
    tokenizer.set_prefix_tokens()
    torch.manual_seed(0)
    sizes = {
        f"{part}_{of}": n
        for part in ("encoder", "decoder")
        for of, n in {"layers": 2, "attention_heads": 4, "ffn_dim": 32}.items()
    }
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        **sizes,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config.alignment_heads = [[1, 0], [1, 2]]
    return model, WhisperProcessor(WhisperFeatureExtractor(), tokenizer)


def read_wav(path: Path, rate: int) -> np.ndarray:
    """Return the first channel of a 16-bit WAV file, resampled to ``rate`` samples a second."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise typer.BadParameter(
                f"--audio must be a WAV file of 16 bits; {path} has {8 * file.getsampwidth()}."
            )
        given = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        sound = given.reshape(-1, file.getnchannels())[:, 0] / 2**15
        n = round(len(sound) * rate / file.getframerate())
    # band-limited: keep the frequencies that both rates can hold
    return np.fft.irfft(np.fft.rfft(sound)[: n // 2 + 1], n) * n / len(sound)


def word_tokens(text: str, encoded: Any) -> tuple[np.ndarray, list[str]]:
    """Return the position of each word's first token, and the words."""
    offsets = encoded.offset_mapping[0].tolist()
    found = list(re.finditer(r"\w[\w'’-]*", text))  # noqa: RUF001 - the apostrophe of texts
    first = [
        next(
            i for i, (start, end) in enumerate(offsets) if start < word.end() and end > word.start()
        )
        for word in found
    ]
    return np.array(first), [word.group() for word in found]


def known_starts(names: list[str], path: Path) -> np.ndarray:
    """Return the known start of each word in seconds; NaN for words that the table lacks."""
    starts = np.full(len(names), np.nan)
    known = pd.read_csv(path, keep_default_na=False)
    ours, theirs = ([str(word).lower() for word in of] for of in (names, known["word"]))
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        times = known["start_s"].iloc[block.b : block.b + block.size]
        starts[block.a : block.a + block.size] = times
    return starts


if __name__ == "__main__":
    typer.run(main)
