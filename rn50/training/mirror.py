"""A copy of a run's folder in S3, so that another machine can go on with the run."""

import os
import threading
from pathlib import Path

from rn50.cloud.advice import advice_in
from rn50.cloud.store import RECORDS
from rn50.errors import RunError, UsageError
from rn50.training.checkpoint import LAST, wait_until

RETRY_SECONDS = 30.0
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 30, 2


class Mirror:
    """s3://bucket/prefix/{last.pt, log.jsonl, …} through boto3, with the credentials and endpoint that boto3 finds.

    Uploads go on in a thread, the newest checkpoint first. What fails is said once through `warn` and tried again. The
    step of a checkpoint is in its object's metadata. An object is replaced as a whole, so half an upload is none.
    """

    def __init__(self, url, *, folder, warn):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not url.startswith("s3://") or not bucket:
            raise UsageError(f"logging.mirror={url} is not of the form s3://bucket/prefix")
        try:
            import boto3
            from boto3.s3.transfer import TransferConfig
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            raise UsageError("logging.mirror needs boto3; install it with: pip install boto3") from None
        self.url, self.folder = url, Path(folder)
        self._bucket, self._prefix = bucket, "/".join(part for part in (prefix.strip("/"), self.folder.name) if part)
        self._errors, self._client_error, self._warn = (BotoCoreError, ClientError, OSError), ClientError, warn
        try:
            self._s3 = boto3.client(
                "s3",
                config=Config(
                    connect_timeout=CONNECT_SECONDS,
                    read_timeout=READ_SECONDS,
                    retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
                ),
            )
        except (BotoCoreError, ValueError) as error:
            raise UsageError(f"logging.mirror={url}: boto3 cannot be used here: {error}") from None
        # threads of boto3's own would keep the process from ending
        self._transfer = TransferConfig(use_threads=False)
        self._offered, self._failing, self._changed = None, False, threading.Condition()
        self._thread = None

    def fetch(self, *, into, later_than):
        """Download the checkpoint there is to `into` if its step is later than `later_than`; returns whether it did.

        later_than: None where nothing is here: then a mirror that does not answer is a RunError, because starting over
        would replace what it holds.
        """
        try:
            step = self._step()
            if step is None or (later_than is not None and step <= later_than):
                return False
            # by name, boto3 would leave a partial file of its own behind when it is killed
            with open(into, "wb") as file:
                self._s3.download_fileobj(self._bucket, self._key(LAST), file, Config=self._transfer)
                file.flush()
                os.fsync(file.fileno())
            return True
        except self._errors as error:
            if later_than is None:
                raise RunError(
                    f"cannot read the mirror {self.url} ({_first_line(error)}), and there is no checkpoint here: "
                    "repeat the command when it answers, or leave logging.mirror out to start anew"
                ) from None
            self._say(error)
            return False

    def offer(self, path, step):
        """Upload the checkpoint at `path` in the background, instead of an older one that waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()
        # opened here, because the next checkpoint moves this one to another name
        file = open(path, "rb")  # noqa: SIM115
        with self._changed:
            self._offered = file, step  # the one before is closed when its upload, if it has begun, lets go of it
            self._changed.notify_all()

    def wait(self, patience):
        """Whether all that was offered is in the mirror within `patience` seconds, or the time that a stop leaves."""
        return wait_until(self._changed, lambda: self._offered is None, patience)

    def put_records(self):
        """Upload the folder's small files now."""
        if self._failing:
            return
        try:
            for name in RECORDS:
                if (self.folder / name).exists():
                    self._s3.upload_file(str(self.folder / name), self._bucket, self._key(name), Config=self._transfer)
        except self._errors as error:
            self._say(error)

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._offered is not None)
                offered = self._offered
            try:
                self._upload(*offered)
            except Exception as error:  # boto3's transfers raise classes of their own
                self._say(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._offered is not offered, RETRY_SECONDS)  # noqa: B023
                continue
            if self._failing:
                self._failing = False
                self._warn(f"the mirror {self.url} is written again")
            with self._changed:
                if self._offered is offered:
                    self._offered = None
                    self._changed.notify_all()
            self.put_records()

    def _upload(self, file, step):
        file.seek(0)
        # boto3 closes what it was given
        with open(file.fileno(), "rb", closefd=False) as again:
            extra = {"Metadata": {"step": str(step)}}
            self._s3.upload_fileobj(again, self._bucket, self._key(LAST), ExtraArgs=extra, Config=self._transfer)

    def _step(self):
        try:
            found = self._s3.head_object(Bucket=self._bucket, Key=self._key(LAST))
        except self._client_error as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchKey"):
                raise
            self._s3.head_bucket(Bucket=self._bucket)  # a bucket that is not there is an error: it may be misspelt
            return None
        return int(found["Metadata"].get("step", 0))

    def _key(self, name):
        return f"{self._prefix}/{name}"

    def _say(self, error):
        if not self._failing:
            self._failing = True
            advice = f": {found}" if (found := advice_in(str(error))) else ""
            self._warn(
                f"cannot use the mirror {self.url} ({_first_line(error)}){advice}; training goes on, and this is tried "
                "again"
            )


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]
