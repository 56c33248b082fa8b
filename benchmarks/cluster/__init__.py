"""An emulated cluster on one machine, and training programs that are compared on it.

Each host is a Linux network namespace; a bridge in one more namespace joins them. Traffic between ranks of one host
stays on the namespace's loopback; traffic between hosts passes ``eth0``, whose two directions are rate-limited and
whose byte counters are the kernel's. ``network`` builds this, ``launch`` starts one process a rank and asks it to work,
``rank`` is that process. Training programs: ``flat`` (written by hand), ``torchrec_programs``, ``ours`` (through
``torch.compile``), on the one ``workload``; ``programs`` lists them. ``session`` measures, ``results`` keeps and prints.

Started by ``benchmarks/cluster_bench.py``.
"""
