# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: peer_certificate
short_description: A certificate and key for the hosts of one run
version_added: 0.1.0
description:
  - Made anew at each call and written nowhere. Both sides of a connection show it and accept no other, so that what goes
    from host to host is encrypted and both ends are known. Uses C(cryptography), which ansible-core needs itself.
options:
  _input:
    description: Name in the certificate.
    type: str
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Make one
  ansible.builtin.set_fact:
    credentials: "{{ 'models' | baremetal.vllm.peer_certificate }}"
  no_log: true
"""

RETURN = r"""
_value:
  description: C(certificate) and C(key) in PEM.
  type: dict
"""

import datetime
from typing import Any


def peer_certificate(name: str) -> dict[str, str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    # The key lives as long as the run; the clocks of new hosts may be wrong by years.
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(now.replace(tzinfo=None) + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {
        "certificate": certificate.public_bytes(serialization.Encoding.PEM).decode(),
        "key": private.decode(),
    }


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"peer_certificate": peer_certificate}
