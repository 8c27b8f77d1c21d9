// SPDX-License-Identifier: GPL-2.0-or-later
// A PCI bus of its own with one function on it: what the kernel and udev see of a Tesla V100 (10de:1db6, a 3D controller).
// Everything above it is real: the modalias that makes udev load nouveau, and nouveau's probe, which finds no registers.
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/version.h>

static u8 config[256] = {
	[PCI_VENDOR_ID] = 0xde, [PCI_VENDOR_ID + 1] = 0x10,
	[PCI_DEVICE_ID] = 0xb6, [PCI_DEVICE_ID + 1] = 0x1d,
	[PCI_REVISION_ID] = 0xa1,
	[PCI_CLASS_DEVICE] = 0x02, [PCI_CLASS_DEVICE + 1] = 0x03,
};
static struct pci_sysdata sysdata = { .domain = 0x1000, .node = NUMA_NO_NODE };
static struct resource numbers = { .name = "fakegpu", .start = 0, .end = 0, .flags = IORESOURCE_BUS };
static struct pci_bus *bus;

static int config_read(struct pci_bus *of, unsigned int devfn, int where, int size, u32 *value)
{
	*value = ~0;
	if (of->number || devfn)
		return PCIBIOS_DEVICE_NOT_FOUND;
	*value = 0;
	if (where + size <= (int)sizeof(config))
		memcpy(value, config + where, size);
	return PCIBIOS_SUCCESSFUL;
}

static int config_write(struct pci_bus *of, unsigned int devfn, int where, int size, u32 value)
{
	if (of->number || devfn)
		return PCIBIOS_DEVICE_NOT_FOUND;
	if (where == PCI_COMMAND) /* the only register that takes a value: there are no BARs */
		memcpy(config + where, &value, 2);
	return PCIBIOS_SUCCESSFUL;
}

static struct pci_ops ops = { .read = config_read, .write = config_write };

static int __init fakegpu_init(void)
{
	LIST_HEAD(resources);

	pci_add_resource(&resources, &numbers);
	pci_lock_rescan_remove();
	bus = pci_create_root_bus(NULL, 0, &ops, &sysdata, &resources);
	if (bus) {
		pci_scan_child_bus(bus);
		pci_bus_add_devices(bus);
	} else {
		pci_free_resource_list(&resources);
	}
	pci_unlock_rescan_remove();
	return bus ? 0 : -ENOMEM;
}

static void __exit fakegpu_exit(void)
{
	pci_lock_rescan_remove();
	pci_stop_root_bus(bus);
	pci_remove_root_bus(bus);
	pci_unlock_rescan_remove();
}

module_init(fakegpu_init);
module_exit(fakegpu_exit);
MODULE_DESCRIPTION("What a host sees of an NVIDIA GPU before any driver");
MODULE_LICENSE("GPL");
MODULE_VERSION(FAKEGPU_VERSION);
