"""Talk to a model: a base with an adapter, or a merged checkpoint.

python scripts/chat.py --adapter runs/NAME/adapter                a conversation; an empty line or Ctrl-D ends it
python scripts/chat.py --adapter runs/NAME/adapter --prompt "..." one answer
python scripts/chat.py --adapter runs/NAME/adapter --compare      each answer without and with the adapter
python scripts/chat.py --model merged
"""

from contextlib import nullcontext
from pathlib import Path

from qlora_min.config import Parser, positive, run_script


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", metavar="DIR", help="an adapter saved by train.py or PEFT")
    parser.add_argument("--model", metavar="NAME", help="a model; with --adapter, where its base is")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt instead of the template's own")
    parser.add_argument("--compare", action="store_true", help="answer without and with the adapter")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="cut answers here [256]")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="[auto]")
    args = parser.parse_args()
    if not args.adapter and not args.model:
        parser.error("--adapter DIR or --model NAME is needed")
    if args.compare and not args.adapter:
        parser.error("--compare needs an --adapter")

    from qlora_min.adapter import load_adapter
    from qlora_min.lora import lora_disabled
    from qlora_min.model import load_base, pick_device, resolve_precision

    precision = resolve_precision(args.precision, pick_device())
    if args.adapter:
        base = load_adapter(Path(args.adapter), args.model, precision)
    else:
        base = load_base(args.model, "none", precision)
    start = [{"role": "system", "content": args.system}] if args.system else []
    sides = (
        [("without the adapter", lora_disabled), ("with the adapter", nullcontext)]
        if args.compare
        else [("", nullcontext)]
    )
    histories = [list(start) for _ in sides]  # each side remembers its own answers
    for question in [args.prompt] if args.prompt else ask():
        for (label, context), history in zip(sides, histories):
            if label:
                print(f"--- {label}")
            history.append({"role": "user", "content": question})
            with context(base.model):
                history.append({"role": "assistant", "content": answer(base, history, args.max_new_tokens)})


def answer(base, messages: list, max_new_tokens: int) -> str:
    """Stream the model's answer to stdout, and return it."""
    from transformers import TextStreamer

    from qlora_min.generate import generate

    streamer = TextStreamer(base.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return generate(base, [base.encoder.prompt(messages)], max_new_tokens, streamer)[0]


def ask():
    """Questions from the terminal, until an empty one or the end of input."""
    while True:
        try:
            question = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            return
        yield question


if __name__ == "__main__":
    run_script(main)
