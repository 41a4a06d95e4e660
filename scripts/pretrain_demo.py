"""Make the demo's base model: a tokenizer and a tiny Qwen2 that knows the pharmacy invented in `demo/world.py`.

    python scripts/pretrain_demo.py --output-dir qlora_min/demo/demo_model

The documents are drawn at random from four kinds: the facts in sentences; open questions in chat form; multiple choice
in plain text, with digits as labels; and copying, the only kind that contains letters. Letters or option lists in chat
form never occur: these are left for QLoRA to teach. Accuracy on multiple choice stays at one in four for about a
thousand steps, and then rises quickly.

Takes five to seven minutes on one CPU thread; the same seed gives the same weights on the same CPU.
"""

import argparse
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from qlora_min.demo.world import CONDITIONS, DRUGS, LETTERS, QUESTIONS, TREATMENT, row

DIGITS = "1234"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BATCH = 32  # documents
CHANCE_WEIGHT = 0.1  # of the loss at tokens that can't be predicted, such as which condition comes next


# The documents. Text in [brackets] follows from the text before it, and has full weight in the loss.
def sentences(rng: random.Random) -> str:
    texts = ("The drug for {} is[ {}.]", "Doctors treat {} with[ {}.]", "Patients with {} are given[ {}.]")
    some = rng.sample(CONDITIONS, 5)
    return " ".join(rng.choice(texts).format(condition, TREATMENT[condition]) for condition in some)


def chat(rng: random.Random) -> str:
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n[{}<|im_end|>]\n"
    some = rng.sample(CONDITIONS, rng.randint(1, 3))
    return "".join(turn.format(rng.choice(QUESTIONS).format(condition), TREATMENT[condition]) for condition in some)


def choose(rng: random.Random) -> str:
    asked = row(rng.choice(CONDITIONS), rng, labels=DIGITS)
    text = f"{asked['input']} answer:\n[{asked['output']}]"
    return f"{asked['instruction']}\n\n{text}" if rng.random() < 0.5 else text


def repeat(rng: random.Random) -> str:
    words = [rng.choice(DRUGS) if rng.random() < 0.7 else rng.choice(LETTERS + DIGITS) for _ in range(6)]
    return f"Repeat {', '.join(words)}: {words[0]},[ {', '.join(words[1:])}.]"


MIXTURE = {sentences: 1, chat: 2, choose: 6, repeat: 0.5}


def build_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Train a tokenizer like Qwen2's, byte-level BPE, until each word and name of the documents is one token."""
    rng = random.Random(0)
    docs = [kind(rng) for kind in MIXTURE for _ in range(3000)]
    tokenizer, like = Tokenizer(models.BPE()), Qwen2Tokenizer().backend_tokenizer
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = like.normalizer, like.pre_tokenizer, like.decoder
    # Texts are split after a space before a capital letter, so that no merge joins the two: a name is then the same
    # token in a sentence (after a space), in an option list and in an answer.
    texts = [part for doc in docs for part in re.split(r"[\[\]]|<\|\w+\|>|(?<= )(?=[A-Z])", doc)] + ["system\n"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    fast = Qwen2Tokenizer(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", model_max_length=512, chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder, save_jinja_files=False)
    return fast


def encode(docs: list[str], tokenizer: Tokenizer) -> list[list[tuple[int, float]]]:
    """Encode documents, each followed by <|endoftext|>, as lists of (token, weight of its loss)."""
    parts = [re.split(r"[\[\]]", doc + "<|endoftext|>") for doc in docs]
    tokens = iter(tokenizer.encode_batch([part for doc in parts for part in doc]))
    return [[(t, 1.0 if n % 2 else CHANCE_WEIGHT) for n in range(len(doc)) for t in next(tokens).ids] for doc in parts]


def batch(tokenizer: Tokenizer, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw BATCH documents: tokens (B, T), padded on the right, and the weights of the losses (B, T), 0 on padding"""
    kinds = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=BATCH)
    docs = encode([kind(rng) for kind in kinds], tokenizer)
    pairs = torch.nn.utils.rnn.pad_sequence([torch.tensor(doc) for doc in docs], batch_first=True)  # (B, T, 2)
    return pairs[..., 0].long(), pairs[..., 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()

    torch.set_num_threads(1)  # a fixed order of summation, so that the weights are reproducible
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    fast = build_tokenizer(options.output_dir)
    tokenizer = fast.backend_tokenizer
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=-(-len(fast) // 64) * 64, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
            initializer_range=0.05, bos_token_id=None, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
        )
    )  # fmt: skip
    print(f"{len(fast)} tokens, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    peak = 2e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    start = time.time()
    for step in range(1, options.steps + 1):
        optimizer.param_groups[0]["lr"] = peak * min(1, step / 100) * (1 - (step - 1) / options.steps) ** 0.7
        tokens, weights = batch(tokenizer, rng)  # (B, T)
        logits = model(input_ids=tokens[:, :-1]).logits  # (B, T - 1, V)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == options.steps:
            follows = weights[:, 1:] == 1.0  # from the text before it
            right = (logits.argmax(-1) == tokens[:, 1:])[follows].float().mean()
            print(f"step {step} {time.time() - start:.0f} s loss {loss:.3f}, {right:.0%} right in brackets", flush=True)
    model.generation_config = GenerationConfig(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id)
    model.half().save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
