// Command loadimages copies images from an archive, as `docker save` writes one, into the storage of a CRI-O that doesn't run. It belongs
// to CRI-O's module, so that both have the same version of the storage.
//
//	loadimages ARCHIVE ROOT RUNROOT IMAGE...
package main

import (
	"context"
	"fmt"
	"os"

	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/transports/alltransports"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage/pkg/reexec"
)

func main() {
	if reexec.Init() { // the storage executes this program to unpack a layer
		return
	}
	if len(os.Args) < 5 {
		fmt.Fprintln(os.Stderr, "usage: loadimages ARCHIVE ROOT RUNROOT IMAGE...")
		os.Exit(2)
	}
	archive, root, runRoot := os.Args[1], os.Args[2], os.Args[3]
	for _, image := range os.Args[4:] {
		if err := load(context.Background(), archive, root, runRoot, image); err != nil {
			fmt.Fprintf(os.Stderr, "failed to load image %q: %v\n", image, err)
			os.Exit(1)
		}
	}
}

func load(ctx context.Context, archive, root, runRoot, image string) error {
	from, err := alltransports.ParseImageName("docker-archive:" + archive + ":" + image)
	if err != nil {
		return err
	}
	to, err := alltransports.ParseImageName(fmt.Sprintf("containers-storage:[overlay@%s+%s]%s", root, runRoot, image))
	if err != nil {
		return err
	}
	policy, err := signature.NewPolicyContext(&signature.Policy{Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()}})
	if err != nil {
		return err
	}
	defer policy.Destroy()
	// The default directory of this cache is outside of the storage.
	_, err = copy.Image(ctx, policy, to, from, &copy.Options{DestinationCtx: &types.SystemContext{BlobInfoCacheDir: runRoot}})
	return err
}
