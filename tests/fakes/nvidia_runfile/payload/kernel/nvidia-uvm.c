/* A stand-in of nvidia-uvm.ko: a module of that name, version and licence that does nothing. */
#include <linux/module.h>
static int __init standin_init(void) { return 0; }
static void __exit standin_exit(void) { }
module_init(standin_init);
module_exit(standin_exit);
MODULE_LICENSE("@LICENSE@");
MODULE_VERSION("@VERSION@");
MODULE_DESCRIPTION("stand-in");
