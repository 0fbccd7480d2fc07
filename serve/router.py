"""vllm-router over several servers of one model:  .venv-vllm/bin/python -m serve.router PORT URL ...

It needs no key of its own: a client's key is good if a server behind it takes it. Without that, which vllm-router's
command line cannot ask for, anyone who reaches the port could add a server that reads what is asked.
Runs in vLLM's environment: standard library and vllm-router only.
"""

import sys
from typing import Any

METRICS_PORT_OFFSET = 1000


def settings(port: int, servers: list[str]) -> dict[str, Any]:
    """What the router is told.

    A server is out after two failures and tried again after ten seconds; a request that found it dead goes to another
    before its client sees anything. A stream that has begun ends with the server that wrote it.
    """
    return {
        "worker_urls": servers,
        "host": "127.0.0.1",
        "port": port,
        "api_key_validation_urls": [f"{server}/v1/models" for server in servers],
        "worker_startup_check_interval": 1,
        "retry_max_retries": 5,
        "retry_initial_backoff_ms": 50,
        "cb_failure_threshold": 2,
        "cb_success_threshold": 1,
        "cb_timeout_duration_secs": 10,
        "health_check_interval_secs": 5,
        "health_failure_threshold": 2,
        "health_success_threshold": 1,
        "max_payload_size": 4_000_000,
        "request_timeout_secs": 600,
        "log_level": "warn",
        "prometheus_host": "127.0.0.1",
        "prometheus_port": port + METRICS_PORT_OFFSET,
    }


if __name__ == "__main__":
    from vllm_router_rs import PolicyType, Router

    port, *servers = sys.argv[1:]
    Router(policy=PolicyType.PowerOfTwo, **settings(int(port), servers)).start()
