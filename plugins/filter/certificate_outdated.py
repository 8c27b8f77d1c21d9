# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter certificate_outdated."""

from __future__ import annotations

DOCUMENTATION = r"""
name: certificate_outdated
short_description: Why a certificate that was made here has to be made anew
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Looks for the names that clients use, and whether it ends within 30 days. A name too many is no reason, since clients would
    have to trust another certificate for it.
  - One that an authority has signed was not made here, and is left as it is. Uses C(cryptography), which ansible-core needs
    itself.
positional: names
options:
  _input:
    description: The certificate in PEM.
    type: str
    required: true
  names:
    description: Host names and addresses that it must be for.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Say why clients fail
  ansible.builtin.debug:
    msg: "{{ lookup('ansible.builtin.file', 'certificate.pem') | baremetal.vllm.certificate_outdated(['gpu1.example.org']) }}"
"""

RETURN = r"""
_value:
  description: The reason, to be read after the name of the file; empty when there is none.
  type: str
  sample: is not for gpu1.example.org
"""

import datetime
import ipaddress
from typing import Any

# Enough for a site that is looked after once a month.
DAYS = 30


def _name(name: str) -> str:
    """A name or an address as it is compared."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()


def end_of(certificate: Any) -> datetime.datetime:
    """When a certificate of C(cryptography) ends."""
    try:
        end: datetime.datetime = certificate.not_valid_after_utc
    except AttributeError:  # cryptography before 42
        end = certificate.not_valid_after.replace(tzinfo=datetime.timezone.utc)
    return end


def certificate_outdated(pem: str, names: list[str]) -> str:
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        known = x509.SubjectAlternativeName([])
    except ValueError:
        return "is no certificate"
    if certificate.issuer != certificate.subject:
        return ""
    has = {name.lower() for name in known.get_values_for_type(x509.DNSName)}
    has |= {str(address) for address in known.get_values_for_type(x509.IPAddress)}
    lacks = [name for name in names if _name(name) not in has]
    if lacks:
        return f"is not for {', '.join(lacks)}"
    end = end_of(certificate)
    left = end - datetime.datetime.now(datetime.timezone.utc)
    return f"ends on {end:%Y-%m-%d}" if left < datetime.timedelta(days=DAYS) else ""


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, object]:
        return {"certificate_outdated": certificate_outdated}
