"""Encoded images of a source -> the pictures that a ladder stores, by several processes, in order."""

import hashlib
import multiprocessing
import signal
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import cv2

from rn50.data.beton import JPG, RAW
from rn50.data.native import index_jpeg
from rn50.data.pictures import decode_image, lacks_end
from rn50.errors import RunError

CHUNK = 16  # images a worker takes at a time
HELD_BYTES = 256 << 20  # finished images that may wait in the parent for a slower one before them
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def encode_image(rgb, quality):
    """uint8 (height, width, 3) RGB -> a baseline JPEG at `quality` (1-100), and behind it the table of its tiles.

    Every decoder stops before the table; the fast path (decode.py) begins decoding next to its crop with it.
    """
    jpeg = encode_jpeg(rgb, quality)
    return jpeg + index_jpeg(jpeg)


def encode_jpeg(rgb, quality):
    """uint8 (height, width, 3) RGB -> the bytes of a baseline JPEG at `quality` (1-100)."""
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"OpenCV cannot encode a picture of {rgb.shape[1]}x{rgb.shape[0]} pixels")
    return encoded.tobytes()


def shrink_image(rgb, max_side):
    """`rgb` with its longer side at most `max_side`; smaller pictures are returned as they are.

    The short side is rounded down as FFCV does, so that the files are comparable, but in whole numbers: FFCV's
    floating-point product can fall just below the integer and lose a pixel of the long side too.
    """
    height, width = rgb.shape[:2]
    longer = max(height, width)
    if longer <= max_side:
        return rgb
    size = (max(1, width * max_side // longer), max(1, height * max_side // longer))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


NO_END = "has no end-of-image marker; every pixel is there"


def encode_sample(source, i, rungs, encoding):
    """(id, label, pictures, remark) of sample `i`.

    pictures: one (mode, width, height, bytes) for each rung, or the text of what is wrong with it. remark: what is odd
    about one that could be used all the same, or None.
    """
    sample_id, label = source.item(i)
    try:
        encoded = source.read(i)
        rgb = decode_image(encoded)
        raw = stored_raw(sample_id, encoding["seed"], encoding["raw_share"])
        pictures = []
        for rung in rungs:
            picture = shrink_image(rgb, rung)
            height, width = picture.shape[:2]
            data = picture.tobytes() if raw else encode_image(picture, encoding["quality"])
            pictures.append((RAW if raw else JPG, width, height, data))
        return sample_id, label, pictures, NO_END if lacks_end(encoded) else None
    except (ValueError, OSError) as error:
        return sample_id, label, str(error), None


def stored_raw(sample_id, seed, share):
    """Whether the sample is among the `share` stored as pixels; a hash, so that it depends on nothing else."""
    digest = hashlib.sha256(f"{seed}/{sample_id}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def encode_all(job, order, workers):
    """Yield `encode_sample` of each index in `order`, in this order, encoded by `workers` processes.

    RunError as soon as a process dies. At most HELD_BYTES (and a chunk a worker) wait here, however slow one image is.
    Not concurrent.futures: its workers live on when this process is killed, and it cannot say what killed one of them.
    """
    chunks = [order[k : k + CHUNK].tolist() for k in range(0, len(order), CHUNK)]
    processes = {}
    try:
        for _ in range(min(workers, len(chunks))):
            connection, process = _start_worker(job)
            processes[connection] = process
        idle, holders, finished = list(processes), {}, {}
        held, started, wanted = 0, 0, 0
        while wanted < len(chunks):
            while idle and started < len(chunks):
                _exchange(processes, idle[0], idle[0].send, chunks[started])
                holders[started] = idle.pop(0)
                started += 1
            listen = list(holders.values()) if held < HELD_BYTES else [holders[wanted]]
            for connection in wait(listen + [process.sentinel for process in processes.values()]):
                if isinstance(connection, int):
                    _report_death(next(p for p in processes.values() if p.sentinel == connection))
                head = _exchange(processes, connection, connection.recv)
                data = _exchange(processes, connection, connection.recv_bytes)
                chunk = next(k for k, holder in holders.items() if holder is connection)
                del holders[chunk]
                idle.append(connection)
                finished[chunk] = (head, data)
                held += len(data)
            while wanted in finished:
                head, data = finished.pop(wanted)
                held -= len(data)
                wanted += 1
                yield from _unpack(head, data)
    finally:
        for process in processes.values():
            process.kill()
        for connection, process in processes.items():
            process.join()
            connection.close()


def _start_worker(job):
    # 'spawn', because a fork copies whatever threads and locks the parent has. SIGINT stays blocked in the worker:
    # Ctrl-C reaches the whole group, and only the parent should speak.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, job.source, list(job.paths), job.encoding)
    process = context.Process(target=_work, args=arguments, daemon=True)
    resource_tracker.ensure_running()  # start() does this too, and it unblocks SIGINT when it is done
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Blocked or not, a library's thread may take a signal, and half a start leaves a worker without its instructions.
    came = []
    handlers = {number: signal.signal(number, lambda *which: came.append(which)) for number in STOP_SIGNALS}
    try:
        process.start()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number, _ in came:
        signal.raise_signal(number)
    theirs.close()  # so that the pipe ends when the worker does
    return ours, process


def _work(connection, source, rungs, encoding):
    cv2.setNumThreads(1)
    try:
        while True:
            head, blobs = [], []
            for i in connection.recv():
                sample_id, label, pictures, remark = encode_sample(source, i, rungs, encoding)
                if not isinstance(pictures, str):
                    blobs += [data for *_, data in pictures]
                    pictures = [(*rest, len(data)) for *rest, data in pictures]
                head.append((sample_id, label, pictures, remark))
            connection.send(head)
            connection.send_bytes(b"".join(blobs))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone


def _unpack(head, data):
    view, start = memoryview(data), 0
    for sample_id, label, pictures, remark in head:
        if not isinstance(pictures, str):
            sized, pictures = pictures, []
            for mode, width, height, size in sized:
                pictures.append((mode, width, height, view[start : start + size]))
                start += size
        yield sample_id, label, pictures, remark


def _exchange(processes, connection, action, *arguments):
    try:
        return action(*arguments)
    except (EOFError, OSError):
        _report_death(processes[connection])


def _report_death(process):
    process.join(5)
    code = process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
    hint = "; it may have run out of memory: try fewer out.workers" if code == -signal.SIGKILL else ""
    raise RunError(f"an encoding worker {how}{hint}; run the same command again to continue")
