package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// serve serves the images by a registry on the loopback of the node, and configures the node's
// containerd, whose registry config_path is hosts, to use it for all registries. The caller must
// close it.
func serve(ctx context.Context, n *harness.Node, images map[string]v1.Image, hosts string) (io.Closer, error) {
	l, err := n.Listen()
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	go func() { _ = server.Serve(l) }() // until Close
	address := "http://" + l.Addr().String()
	for reference, image := range images {
		if err := (push{n.HTTP(), address}).image(ctx, reference, image); err != nil {
			return nil, errors.Join(fmt.Errorf("failed to put image %q into the registry: %w", reference, err), server.Close())
		}
	}
	if err := everyHost(address, hosts); err != nil {
		return nil, errors.Join(err, server.Close())
	}
	return server, nil
}

// everyHost makes the registry at address a mirror for all hosts.
func everyHost(address, hosts string) error {
	dir := filepath.Join(hosts, "_default")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = %q\n", address), 0o644)
}

// push puts images into the registry at an address, by OCI's distribution specification.
// go-containerregistry's client would add the dependencies of Docker's command line.
type push struct {
	client  *http.Client
	address string
}

func (p push) image(ctx context.Context, reference string, image v1.Image) error {
	repository, tag, _ := strings.Cut(reference, ":")
	layers, err := image.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		if err := p.layer(ctx, repository, l); err != nil {
			return err
		}
	}
	config, err := image.RawConfigFile()
	if err != nil {
		return err
	}
	name, err := image.ConfigName()
	if err != nil {
		return err
	}
	if err := p.blob(ctx, repository, name, config); err != nil {
		return err
	}
	manifest, err := image.RawManifest()
	if err != nil {
		return err
	}
	mediaType, err := image.MediaType()
	if err != nil {
		return err
	}
	return p.send(ctx, http.MethodPut, repository+"/manifests/"+tag, string(mediaType), manifest)
}

func (p push) layer(ctx context.Context, repository string, l v1.Layer) error {
	digest, err := l.Digest()
	if err != nil {
		return err
	}
	r, err := l.Compressed()
	if err != nil {
		return err
	}
	defer r.Close()
	content, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	return p.blob(ctx, repository, digest, content)
}

func (p push) blob(ctx context.Context, repository string, digest v1.Hash, content []byte) error {
	return p.send(ctx, http.MethodPost, repository+"/blobs/uploads/?digest="+url.QueryEscape(digest.String()), "application/octet-stream", content)
}

func (p push) send(ctx context.Context, method, path, mediaType string, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, method, p.address+"/v2/"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := p.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("%s %s: %s", method, path, resp.Status)
	}
	return nil
}
