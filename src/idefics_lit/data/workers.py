"""Keep a DataLoader's workers alive when a signal reaches the whole process group."""

import os
import signal
import threading


def ignore_group_signals(worker_id: int) -> None:
    """Ignore SIGINT, and SIGTERM unless the main process sends it: the ``worker_init_fn`` of a DataLoader.

    ``timeout``, Ctrl-C, systemd and SLURM signal workers and main process alike. The main process needs its workers to
    finish the batch and to save. It ends them itself with SIGTERM, and they end by themselves once it has died.

    Args:
        worker_id: the number of the worker, which isn't used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which names the sender; macOS and Windows don't have it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as PyTorch's own handler: with another code, the main process would report a killed worker
