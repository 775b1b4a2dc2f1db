package ledger

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// killedWriterEnv makes the test binary the process that TestSurvivesSIGKILL kills: it names the ledger's directories.
const killedWriterEnv = "LEDGER_TEST_KILLED_WRITER"

// runKilledWriter appends until it is killed and says on stdout what was acknowledged.
func runKilledWriter() {
	dirs := strings.Split(os.Getenv(killedWriterEnv), ":")
	l, err := Open(dirs[0], dirs[1])
	if err != nil {
		fmt.Println("error", err)
		return
	}
	var mu sync.Mutex // of stdout
	ctx := context.Background()
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			for j := 0; ; j++ {
				k := key(fmt.Sprintf("%d-%d-%d", os.Getpid(), i, j))
				for _, r := range []*Record{
					{Key: k, Kind: Begun, Data: &Data{TypeURL: "spec", Value: make([]byte, 20_000)}},
					{Key: k, Kind: Intent, Step: "cni", Data: &Data{TypeURL: "conflist", Value: make([]byte, 10_000)}, Durable: true, CanWait: true},
					{Key: k, Kind: Done, Step: "cni", Durable: true},
				} {
					if err := l.Append(ctx, r); err != nil {
						fmt.Println("error", err)
						return
					}
					mu.Lock()
					fmt.Println("has", k.ID, r.Kind)
					mu.Unlock()
				}
				if j%2 == 0 {
					continue
				}
				mu.Lock()
				fmt.Println("forgetting", k.ID)
				mu.Unlock()
				if err := l.Forget(ctx, k); err != nil {
					fmt.Println("error", err)
					return
				}
				mu.Lock()
				fmt.Println("forgot", k.ID)
				mu.Unlock()
			}
		})
	}
	writers.Wait()
}

func TestSurvivesSIGKILL(t *testing.T) {
	d := newDirs(t)
	for round := range 6 {
		acknowledged, forgot, forgetting := killWriter(t, d, 50+round*40)

		l, err := Open(d.root, d.state)
		require.NoError(t, err)
		for _, damage := range l.Damage() {
			require.True(t, damage.Torn, "%+v", damage)
		}
		there := map[string]bool{}
		for _, line := range lines(l.Sandboxes()) {
			there[strings.Join(strings.Fields(line)[:2], " ")] = true
			require.NotContains(t, forgot, strings.Fields(line)[0], "came back")
		}
		for _, a := range acknowledged {
			if id := strings.Fields(a)[0]; !forgetting[id] {
				require.Contains(t, there, a, "acknowledged, but lost")
			}
		}
		for _, sb := range l.Sandboxes() {
			require.NoError(t, l.Forget(context.Background(), sb.Key))
		}
		require.NoError(t, l.Close())
	}
}

// killWriter runs a writer and kills it after it has said that many lines.
func killWriter(t *testing.T, d dirs, after int) (acknowledged []string, forgot, forgetting map[string]bool) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), killedWriterEnv+"="+d.root+":"+d.state)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())

	forgot, forgetting = map[string]bool{}, map[string]bool{}
	said := bufio.NewScanner(out)
	for n := 0; said.Scan(); n++ {
		if n == after {
			require.NoError(t, cmd.Process.Kill())
		}
		verb, what, _ := strings.Cut(said.Text(), " ")
		switch verb {
		case "has":
			acknowledged = append(acknowledged, what)
		case "forgetting":
			forgetting[what] = true
		case "forgot":
			forgot[what] = true
		default:
			t.Errorf("writer said %q", said.Text())
		}
	}
	require.Error(t, cmd.Wait(), "it was killed")
	require.NoError(t, ctx.Err())
	return acknowledged, forgot, forgetting
}
