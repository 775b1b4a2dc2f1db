// etcd is the server of that name: its own module is nothing but this, and not
// on every module proxy.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
