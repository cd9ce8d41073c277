"""Where etcd is, from the variable that Dynamo reads."""

from collections.abc import Mapping

PORT = 2379


def urls(environ: Mapping[str, str]) -> list[str]:
    """Each of ETCD_ENDPOINTS as a URL, or etcd's default."""
    texts = (environ.get("ETCD_ENDPOINTS") or f"http://localhost:{PORT}").split(",")
    return [text.strip() if "//" in text else f"http://{text.strip()}" for text in texts]
