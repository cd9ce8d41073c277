"""Which environment variables each program of the node gets. Nothing else is passed on, so secrets stay where they serve.

A pattern ends in ``*`` or is a whole name.
"""

from collections.abc import Mapping

COMMON = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TMPDIR", "TERM", "XDG_*",
    "PYTHON*", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_*", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "SGNODE_*", "DYN_LOG*",
)  # fmt: skip
"""Every program."""

ENGINE = (
    "SGLANG_*", "SGL_*", "CUDA_*", "NVIDIA_*", "NCCL_*", "GLOO_*", "TORCH*", "PYTORCH_*", "TRITON_*", "FLASHINFER_*", "OMP_*",
    "MKL_*", "KMP_*", "HF_*", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_*", "TOKENIZERS_*", "MC_*", "MOONCAKE_*", "UCX_*", "NIXL_*",
    "NVSHMEM_*", "AWS_*", "GOOGLE_*", "AZURE_*", "RUNAI_*", "DYN_*", "MODEL_EXPRESS_*", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy", "PROMETHEUS_*", "OTEL_*", "GPU_*", "HIP_*", "ROCR_*", "FAILOVER_*", "ENGINE_ID",
    "CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_*", "MAX_JOBS", "LLVM_*", "MLIR_*",
    "TVM_*", "DG_*", "TILELANG_*", "CUTE_*", "CUTLASS_*", "XGRAMMAR_*", "DIFFUSERS_*", "IMAGEIO_*",
)  # fmt: skip
"""The engine and its keeper: accelerator libraries and compilers, model stores and their credentials."""

CLUSTER = (
    "DYN_*", "ETCD_*", "NATS_*", "OTEL_*", "RUST_*", "TOKIO_*", "POD_*", "KUBERNETES_*", "KUBECONFIG", "HF_HUB_*", "HF_HOME",
    "HF_ENDPOINT", "MODEL_EXPRESS_*", "NIXL_*", "UCX_*",
)  # fmt: skip
"""Those that talk to discovery: agents, frontend, coordinator."""

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""Dynamo's media client (1.6.1) refuses what a proxy would fetch, unless DYN_MM_TRUST_EGRESS_PROXY=1: its policy holds."""

STORES = ("AWS_*", "GOOGLE_*", "AZURE_*", "FSSPEC_*", *PROXIES)
"""What stores generated files (--media-output-fs-url): credentials, fsspec's own options, and the way to the store."""

BY_PROGRAM: dict[str, tuple[str, ...]] = {
    "engine": COMMON + ENGINE,
    "agent": COMMON + CLUSTER,
    "agent with files": COMMON + CLUSTER + STORES,
    "frontend": COMMON + CLUSTER,
    "coordinator": COMMON + CLUSTER + ("NOTIFY_SOCKET", "WATCHDOG_USEC"),
    "relay": (*COMMON, "OTEL_*", "CUDA_VISIBLE_DEVICES"),
    "relay with KV events": (*COMMON, *CLUSTER, "CUDA_VISIBLE_DEVICES"),
    "prober": (*COMMON, "DYN_SYSTEM_*", "DYN_HEALTH_*", "DYN_CANARY_*", "DYN_LORA_ENABLED"),
    "supervisord": COMMON + ENGINE + CLUSTER + STORES + ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "INVOCATION_ID"),
}
"""supervisord keeps what any of its programs may get; each program's launcher narrows it again."""


def allowed(program: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The part of ``environ`` that a program may have. KeyError for an unknown program."""
    patterns = BY_PROGRAM[program]
    names = {p for p in patterns if not p.endswith("*")}
    prefixes = tuple(p[:-1] for p in patterns if p.endswith("*"))
    return {key: value for key, value in environ.items() if key in names or key.startswith(prefixes)}
