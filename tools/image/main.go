// Image writes the image of podfsm-deploy as an archive that "docker load" and
// "ctr images import" read. The same input gives the same bytes.
//
//	image -version VERSION -epoch SECONDS -arch ARCH -program PODFSM-DEPLOY -tree TREE -out FILE
package main

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/podfsm/podfsm/tools/ociimage"
)

func main() {
	var i image
	flag.StringVar(&i.version, "version", "", "the version, which is the tag")
	flag.Int64Var(&i.epoch, "epoch", 0, "the time of all files, in seconds")
	flag.StringVar(&i.arch, "arch", "", "the architecture")
	flag.StringVar(&i.program, "program", "", "the path of podfsm-deploy")
	flag.StringVar(&i.tree, "tree", "", "what deploy/package/tree has made")
	out := flag.String("out", "", "the path of the archive")
	flag.Parse()
	if err := i.write(*out); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

type image struct {
	version, arch, program, tree string
	epoch                        int64
}

func (i image) write(out string) error {
	files, err := i.files()
	if err != nil {
		return err
	}
	layer, err := ociimage.Layer(files)
	if err != nil {
		return err
	}
	img, err := ociimage.Image(layer, i.arch, i.time(), v1.Config{
		Entrypoint: []string{"/podfsm-deploy"},
		// The host's: systemd-run is looked up there.
		Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    "podfsm-deploy",
			"org.opencontainers.image.version":  i.version,
			"org.opencontainers.image.source":   "https://github.com/podfsm/podfsm",
			"org.opencontainers.image.licenses": "Apache-2.0",
		},
	})
	if err != nil {
		return err
	}
	tag, err := name.NewTag("podfsm-deploy:" + i.version)
	if err != nil {
		return err
	}
	return tarball.WriteToFile(out, tag, img)
}

func (i image) time() time.Time { return time.Unix(i.epoch, 0).UTC() }

// files are the program, podfsm's files, and where the pod's volumes are mounted on a root
// filesystem that is read-only.
func (i image) files() ([]ociimage.File, error) {
	var files []ociimage.File
	add := func(name string, mode fs.FileMode, body []byte) {
		files = append(files, ociimage.File{Name: name, Mode: int64(mode), Body: body, Time: i.time()})
	}
	for _, dir := range []string{"podfsm", "run", "run/podfsm-deploy", "var", "var/lib", "var/lib/podfsm-deploy", "tmp"} {
		add(dir+"/", 0o755, nil)
	}
	program, err := os.ReadFile(i.program)
	if err != nil {
		return nil, err
	}
	add("podfsm-deploy", 0o755, program)
	err = filepath.WalkDir(i.tree, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || file == i.tree {
			return err
		}
		relative, err := filepath.Rel(i.tree, file)
		if err != nil {
			return err
		}
		name := path.Join("podfsm", relative)
		if entry.IsDir() {
			add(name+"/", 0o755, nil)
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		add(name, info.Mode().Perm(), content)
		return nil
	})
	return files, err
}
