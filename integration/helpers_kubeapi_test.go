package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podfsm/podfsm/integration/harness"
)

// kubeAPI is the part of a Kubernetes API server that CNI plugins use: it stores objects as JSON by
// their paths.
type kubeAPI struct {
	kubeconfig string // for clients on the node
	server     *http.Server

	mu       sync.Mutex
	objects  map[string]map[string]any
	versions int
}

// startKubeAPI serves on the loopback of the node.
func startKubeAPI(t *testing.T, n *harness.Node) *kubeAPI {
	t.Helper()
	l, err := n.Listen()
	require.NoError(t, err)
	a := &kubeAPI{kubeconfig: filepath.Join(t.TempDir(), "kubeconfig"), objects: map[string]map[string]any{}}
	a.server = &http.Server{Handler: a}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = a.server.Serve(l) // until it is closed
	}()
	t.Cleanup(func() {
		a.server.Close()
		<-served
	})
	conf := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],
		"clusters":[{"name":"c","cluster":{"server":"http://%s"}}],"users":[{"name":"u","user":{}}]}`, l.Addr())
	require.NoError(t, os.WriteFile(a.kubeconfig, []byte(conf), 0o600))
	return a
}

// put stores an object.
func (a *kubeAPI) put(path string, object map[string]any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.store(path, object)
}

// annotations returns the annotations of an object.
func (a *kubeAPI) annotations(path string) map[string]any {
	a.mu.Lock()
	defer a.mu.Unlock()
	metadata, _ := a.objects[path]["metadata"].(map[string]any)
	annotations, _ := metadata["annotations"].(map[string]any)
	return maps.Clone(annotations)
}

// drop deletes an object.
func (a *kubeAPI) drop(path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.objects, path)
}

// store stores an object with the next version.
func (a *kubeAPI) store(path string, object map[string]any) map[string]any {
	a.versions++
	metadata, _ := object["metadata"].(map[string]any)
	if metadata == nil {
		metadata = map[string]any{}
		object["metadata"] = metadata
	}
	metadata["resourceVersion"] = fmt.Sprint(a.versions)
	a.objects[path] = object
	return object
}

func (a *kubeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	body, _ := io.ReadAll(r.Body)
	code, answer := a.answer(r.Method, strings.TrimSuffix(r.URL.Path, "/status"), body)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(answer)
}

func (a *kubeAPI) answer(method, name string, body []byte) (code int, answer any) {
	var object map[string]any
	_ = json.Unmarshal(body, &object) // what comes as protobuf, such as the status of a pod, is not kept
	known := a.objects[name]
	switch {
	case method == http.MethodPost:
		metadata, _ := object["metadata"].(map[string]any)
		name = path.Join(name, fmt.Sprint(metadata["name"]))
		if object == nil {
			return http.StatusCreated, map[string]any{}
		}
		if a.objects[name] != nil {
			return failure(http.StatusConflict, metav1.StatusReasonAlreadyExists)
		}
		_, below, _ := strings.Cut(name, "/namespaces/")
		metadata["namespace"], _, _ = strings.Cut(below, "/")
		return http.StatusCreated, a.store(name, object)
	case method == http.MethodGet && isCollection(name):
		return http.StatusOK, a.list(name)
	case known == nil:
		return failure(http.StatusNotFound, metav1.StatusReasonNotFound)
	case method == http.MethodPut && object != nil:
		return http.StatusOK, a.store(name, object)
	case method == http.MethodPatch:
		if err := patch(known, body); err != nil {
			return failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
		}
		return http.StatusOK, a.store(name, known)
	case method == http.MethodDelete:
		delete(a.objects, name)
		return http.StatusOK, metav1.Status{Status: metav1.StatusSuccess}
	}
	return http.StatusOK, known
}

// isCollection reports whether a path ends with a kind of namespaced objects.
func isCollection(name string) bool {
	_, below, _ := strings.Cut(name, "/namespaces/")
	return strings.Count(below, "/") == 1
}

func (a *kubeAPI) list(collection string) map[string]any {
	items := []any{}
	for name, object := range a.objects {
		if path.Dir(name) == collection {
			items = append(items, object)
		}
	}
	return map[string]any{"items": items}
}

func failure(code int, reason metav1.StatusReason) (int, metav1.Status) {
	return code, metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Reason: reason, Message: string(reason), Code: int32(code),
	}
}

// patch applies a JSON patch whose paths lead through objects only, or a merge patch.
func patch(object map[string]any, body []byte) error {
	var values map[string]any
	if err := json.Unmarshal(body, &values); err == nil {
		merge(object, values)
		return nil
	}
	var operations []struct {
		Op, Path string
		Value    any
	}
	if err := json.Unmarshal(body, &operations); err != nil {
		return err
	}
	for _, o := range operations {
		dir, key := path.Split(o.Path)
		parent := object
		for _, name := range strings.Split(strings.Trim(dir, "/"), "/") {
			if parent, _ = parent[name].(map[string]any); parent == nil {
				return fmt.Errorf("there is no %s", dir)
			}
		}
		switch {
		case o.Op == "test" && fmt.Sprint(parent[key]) != fmt.Sprint(o.Value):
			return fmt.Errorf("%s is %v", o.Path, parent[key])
		case o.Op == "remove":
			delete(parent, key)
		case o.Op == "add" || o.Op == "replace":
			parent[key] = o.Value
		}
	}
	return nil
}

// merge puts values into an object, field by field.
func merge(object, values map[string]any) {
	for key, value := range values {
		below, ok := value.(map[string]any)
		if known, exists := object[key].(map[string]any); ok && exists {
			merge(known, below)
			continue
		}
		object[key] = value
	}
}
