"""An emulated cluster on one machine, and training programs that are compared on it.

Each host is a Linux network namespace; a bridge in one more namespace joins them. Traffic between ranks of one host
stays on the namespace's loopback; traffic between hosts passes ``eth0``, whose two directions are rate-limited and
whose byte counters are the kernel's.

``network`` builds this, ``launch`` starts one process a rank, ``rank`` is that process. ``programs`` lists what is
trained: ``flat``, written by hand, ``torchrec_programs``, and ``ours``, through ``torch.compile``; all on ``workload``.
``session`` checks and measures, ``prediction`` computes what should be sent, ``results`` keeps and ``report`` prints.
Started by ``benchmarks/cluster_bench.py``.
"""
