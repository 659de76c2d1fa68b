"""Tokens per second side by side in one run: the loop without a cache, Hugging Face `generate` on an encoder-decoder
of the same size, and vitomr. Batches of 1, 8 and 64 pictures of one size; nobody may end early, all write as much.

    python benchmarks/decoding.py --tokens 200 --threads 1
    python benchmarks/decoding.py --device cuda --compile

Hugging Face's model is a BART of the reader's width, depth and vocabulary, with as many source positions as the
pictures have patches (its weights are random: what it writes is not music). The pictures are encoded beforehand.
The last column is the share of the machine's limit: the longer of the time to read what a step must read (decoder
weights, the pictures' keys and values, the tokens' own) at the bandwidth of a large sum, and the time to multiply what
it must multiply at the rate of a large float32 product, both measured in the same run with the same threads.
The line int8 is the same reader with its weights in eight bits, reading the same pictures.
On a GPU, vitomr's line is the loop of one shape, "launched" the one with a growing cache; of both Python asks for each
operation. "compiled" replays, as one CUDA graph, a step that torch.compile has fused (--compile; on a CPU it is fused
only).
Eight bits are for a CPU.
Hugging Face's line needs a package that the project does not: pip install transformers
"""

import argparse
import copy
import time

import numpy as np
import torch

from vitomr.data.batches import PATCH
from vitomr.nn.decoding import greedy
from vitomr.nn.kernels import quantise
from vitomr.notation.lmx import EOS_ID
from vitomr.transcribe import Transcriber

H, W = 13, 53  # patches of a picture: three bars of piano at 8 px a staff space


def hugging_face(cfg, vocabulary: int):
    "An encoder-decoder of the same size, or None."
    try:
        from transformers import BartConfig, BartForConditionalGeneration
    except ImportError:
        return None
    torch.manual_seed(0)
    d, e = cfg.d_decoder, cfg.encoder_layers
    config = BartConfig(
        vocab_size=vocabulary, d_model=d, max_position_embeddings=2048, encoder_layers=e, encoder_ffn_dim=4 * d,
        encoder_attention_heads=cfg.encoder_heads, decoder_layers=cfg.decoder_layers, decoder_ffn_dim=4 * d,
        decoder_attention_heads=cfg.decoder_heads, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def bandwidth(device: str) -> float:
    "Bytes a second of reading a tensor much larger than the caches."
    x = torch.ones(64_000_000, device=device)
    return 4 * len(x) / seconds(x.sum, 5)


def arithmetic(device: str) -> float:
    "Multiplications and additions a second of a large float32 product."
    n = 1024 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device)
    return 2 * n**3 / seconds(lambda: a @ b, 5)


def limit(model, batch: int, length: float, read: float, multiply: float, width: int = 4) -> float:
    "Tokens a second that memory and arithmetic allow; width is the bytes of a weight."
    outside = ("encoder", "symbol", "embed")
    named = [(n, p.numel()) for n, p in model.named_parameters() if not n.startswith(outside)]
    weights = sum(n for name, n in named if "cross_attention.kv" not in name)  # the picture's keys are there already
    kept = batch * 2 * model.cfg.d_decoder * model.cfg.decoder_layers * (H * W + length)  # keys and values, read once
    bytes_read, operations = width * weights + 4 * kept, 2 * (batch * weights + kept)
    return batch / max(bytes_read / read, operations / multiply)


def seconds(f, repeats: int) -> float:
    f()  # warm
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200, help="that every row writes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="measure the compiled step too")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = Transcriber.from_pretrained(device=args.device).model
    model.head.bias[EOS_ID] = -1e9  # nobody ends
    other = hugging_face(model.cfg, model.cfg.vocabulary_size)
    other = other and other.to(args.device)
    small = quantise(copy.deepcopy(model)) if args.device == "cpu" else None
    rates = bandwidth(args.device), arithmetic(args.device)
    sizes = [f"{sum(p.numel() for p in m.parameters()) / 1e6:.1f} M" if m else "not installed" for m in (model, other)]
    where = f"{args.threads} thread(s)" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(f"vitomr {sizes[0]} parameters, Hugging Face {sizes[1]}; {where}, "
          f"{H * W} patches, {args.tokens} tokens a row, "
          f"{rates[0] / 1e9:.1f} GB/s, {rates[1] / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"{'batch':>5} {'':14} {'tokens/s':>9} {'vitomr is':>10} {'of the limit':>13}")
    for b in args.batches:
        compare(model, small, other, b, rates, args)


def compare(model, small, other, b: int, rates: tuple[float, float], args) -> None:
    "Print the lines of one batch size."
    n, on = args.tokens, {"device": args.device}
    img = torch.randint(0, 256, (b, 1, H * PATCH, W * PATCH), dtype=torch.uint8, **on)
    mask = torch.ones(b, H, W, dtype=torch.bool, **on)
    memory = model.encode(img, mask)
    ways = {"without cache": lambda: greedy(model, img, mask, max_tokens=n, cached=False, memory=memory)}
    if other:
        source = torch.randint(3, 200, (b, H * W), **on)
        states = other.get_encoder()(source)
        settings = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "num_beams": 1}
        ways["Hugging Face"] = lambda: other.generate(source, encoder_outputs=states, **settings)
    ways["vitomr"] = lambda: greedy(model, img, mask, max_tokens=n, memory=memory)
    if img.is_cuda:
        ways["launched"] = lambda: greedy(model, img, mask, max_tokens=n, memory=memory, still=False)
    if args.compile:
        ways["compiled"] = lambda: greedy(model, img, mask, max_tokens=n, memory=memory, compile=True)
    if small:
        own = small.encode(img, mask)
        ways["vitomr, int8"] = lambda: greedy(small, img, mask, max_tokens=n, memory=own)
    if b * n > 2000:
        del ways["without cache"]  # minutes
    took = {name: seconds(way, 1 if name == "without cache" else args.repeats) for name, way in ways.items()}
    best = {"vitomr": limit(model, b, n / 2, *rates), "vitomr, int8": limit(model, b, n / 2, *rates, width=1)}
    for name, t in took.items():
        share = f"{100 * b * n / t / best[name]:.0f} %" if name in best else ""
        print(f"{b:>5} {name:14} {b * n / t:9.0f} {t / took['vitomr']:9.2f}x {share:>13}", flush=True)


if __name__ == "__main__":
    main()
