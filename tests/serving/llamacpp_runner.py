"""Runs GGUF files in llama.cpp, in an environment that has it: ``llamacpp_runner.py JOBS RESULTS``.

xllamacpp offers a server only, without the logits of a prompt. Its library exports the C interface
of llama.cpp, which is called here. Its structures must match llama.h of the pinned version.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from numpy.typing import NDArray

I32, U32, F32, PTR, BOOL = (
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_float,
    ctypes.c_void_p,
    ctypes.c_bool,
)
Logits = NDArray[np.float32]
NO_FLASH_ATTENTION, GGML_F32, MAX_TOKENS = 0, 0, 1024


class ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", PTR),
        ("tensor_buft_overrides", PTR),
        *((name, I32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode")),
        ("main_gpu", I32),
        *((name, PTR) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        ("vocab_only", BOOL),
        ("check_tensors", BOOL),
        *((name, BOOL) for name in ("use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
    )


class ContextParams(ctypes.Structure):
    _fields_ = (
        *((name, U32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, U32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, I32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling")),
        *((name, I32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, F32) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")),
        *((name, F32) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", U32),
        ("defrag_thold", F32),
        ("cb_eval", PTR),
        ("cb_eval_data", PTR),
        ("type_k", I32),
        ("type_v", I32),
        ("moe_cache_size", ctypes.c_size_t),
        ("abort_callback", PTR),
        ("abort_data", PTR),
        *((name, BOOL) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload")),
        ("swa_full", BOOL),
        ("kv_unified", BOOL),
        ("samplers", PTR),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", PTR),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", I32),
        ("token", ctypes.POINTER(I32)),
        ("embd", PTR),
        ("pos", ctypes.POINTER(I32)),
        ("n_seq_id", ctypes.POINTER(I32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(I32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))
    results = {
        "llama_model_default_params": ModelParams,
        "llama_context_default_params": ContextParams,
        "llama_batch_init": Batch,
        "llama_get_logits": ctypes.POINTER(F32),
    }
    for name in ("model_load_from_file", "init_from_model", "get_memory", "model_get_vocab"):
        results[f"llama_{name}"] = PTR
    for name, result in results.items():
        getattr(lib, name).restype = result
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParams]
    lib.llama_init_from_model.argtypes = [PTR, ContextParams]
    lib.llama_decode.argtypes = [PTR, Batch]
    lib.llama_batch_init.argtypes = [I32, I32, I32]
    lib.llama_memory_clear.argtypes = [PTR, BOOL]
    lib.llama_tokenize.argtypes = [PTR, ctypes.c_char_p, I32, ctypes.POINTER(I32), I32, BOOL, BOOL]
    for name in ("get_logits", "get_memory", "free", "model_free", "model_get_vocab"):
        getattr(lib, f"llama_{name}").argtypes = [PTR]
    lib.llama_vocab_n_tokens.argtypes = [PTR]
    return lib


class Model:
    """A GGUF file in llama.cpp, on one thread, with a cache in float32."""

    def __init__(self, lib: ctypes.CDLL, file: str) -> None:
        self.lib = lib
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not open {file}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = MAX_TOKENS
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = GGML_F32
        params.flash_attn_type = NO_FLASH_ATTENTION
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {file}")
        self.batch = lib.llama_batch_init(MAX_TOKENS, 0, 1)
        self.num_tokens = lib.llama_vocab_n_tokens(self.vocab)

    def logits(self, ids: list[int], start: int = 0, *, last: bool = False) -> Logits:
        """Logits after the tokens, ``(T, V)``; ``start`` is the position of the first of them."""
        if start == 0:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        for place, token in enumerate(ids):
            self.batch.token[place], self.batch.pos[place] = token, start + place
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, 0
            self.batch.logits[place] = not last or place == len(ids) - 1
        self.batch.n_tokens = len(ids)
        status = self.lib.llama_decode(self.context, self.batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        rows = self.lib.llama_get_logits(self.context)
        shape = (1 if last else len(ids), self.num_tokens)
        return np.ctypeslib.as_array(rows, shape=shape).copy()

    def loss(self, ids: list[int]) -> float:
        """Mean loss of all tokens but the first, in nats."""
        logits = self.logits(ids)[:-1].astype(np.float64)
        peak = logits.max(axis=1)
        total = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
        return float((total - logits[np.arange(len(ids) - 1), ids[1:]]).mean())

    def greedy(self, ids: list[int], num_new: int) -> list[int]:
        """The most probable continuation, and nothing stops it."""
        new = [int(self.logits(ids, last=True)[-1].argmax())]
        while len(new) < num_new:
            step = self.logits(new[-1:], len(ids) + len(new) - 1, last=True)
            new.append(int(step[-1].argmax()))
        return new

    def tokens(self, text: str) -> list[int]:
        data, place = text.encode(), (I32 * MAX_TOKENS)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), place, MAX_TOKENS, True, True)
        return list(place[:count])

    def speed(self, ids: list[int], num_new: int) -> dict[str, float]:
        """Tokens per second of reading the tokens, and of generating after them."""
        begin = time.perf_counter()
        self.logits(ids, last=True)
        middle = time.perf_counter()
        for step in range(num_new):
            self.logits(ids[:1], len(ids) + step, last=True)
        end = time.perf_counter()
        return {"prefill": len(ids) / (middle - begin), "decode": num_new / (end - middle)}

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def chat(file: str, messages: list[dict[str, str]]) -> dict[str, Any]:  # Any: values of JSON
    """Answer of the server, which applies the file's chat template."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = MAX_TOKENS, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    request = {"messages": messages, "max_tokens": 8, "temperature": 0}
    answer: dict[str, Any] = xllamacpp.Server(params).handle_chat_completions(request)
    return answer


def run(lib: ctypes.CDLL, job: dict[str, Any]) -> dict[str, Any]:  # Any: values of JSON
    model = Model(lib, job["file"])
    found: dict[str, Any] = {  # Any: as above
        "logits": [model.logits(ids).tolist() for ids in job.get("logits", [])],
        "losses": [model.loss(ids) for ids in job.get("losses", [])],
        "greedy": [model.greedy(ids, job["num_new"]) for ids in job.get("greedy", [])],
        "tokens": [model.tokens(text) for text in job.get("texts", [])],
        "speed": [model.speed(ids, job["num_new"]) for ids in job.get("speed", [])],
    }
    model.close()
    if "chat" in job:
        found["chat"] = chat(job["file"], job["chat"])
    return found


if __name__ == "__main__":
    silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, PTR)(lambda *_: None)
    loaded = library()
    if "--verbose" not in sys.argv:
        loaded.llama_log_set(silence, None)
    loaded.llama_backend_init()
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([run(loaded, job) for job in jobs]), encoding="utf-8")
