package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/urfave/cli/v3"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
)

func idsCommand() *cli.Command {
	return &cli.Command{
		Name:            "ids",
		Usage:           "show the id ranges that sandboxes hold, the pool, its quarantine, and the pods that were refused",
		HideHelpCommand: true,
		Flags:           []cli.Flag{outputFlag("json")},
		Action: func(ctx context.Context, cmd *cli.Command) error {
			if err := noArguments(cmd); err != nil {
				return err
			}
			response, err := call(ctx, cmd, podfsmv1.SandboxesClient.IDs, &podfsmv1.IDsRequest{})
			if err != nil {
				return err
			}
			if cmd.String("output") == "json" {
				return writeJSON(cmd.Root().Writer, response)
			}
			return writeIDs(cmd.Root().Writer, response, time.Now())
		},
	}
}

func writeIDs(w io.Writer, r *podfsmv1.IDsResponse, now time.Time) error {
	var b bytes.Buffer
	addPool(&b, r)
	addHolders(&b, r.GetHolders(), now)
	addQuarantine(&b, r.GetPool().GetQuarantine())
	addRefusals(&b, r.GetRefusals(), now)
	_, err := w.Write(b.Bytes())
	return err
}

func addPool(b *bytes.Buffer, r *podfsmv1.IDsResponse) {
	t := newTable(b)
	if pool := r.GetPool(); pool != nil {
		t.row("Pool:", pool.GetSource())
		t.row("Ranges:", fmt.Sprintf("%d, of which %d are held, %d free, %d in quarantine",
			pool.GetRanges(), pool.GetHeld(), pool.GetFree(), len(pool.GetQuarantine())))
	} else {
		t.row("Pool:", "none is configured")
	}
	if r.GetSearchError() != "" {
		t.row("Search:", r.GetSearchError())
	}
	t.flush()
}

func addHolders(b *bytes.Buffer, holders []*podfsmv1.IDHolder, now time.Time) {
	if len(holders) == 0 {
		return
	}
	b.WriteString("\nHolders\n")
	t := newTable(b, "UIDS", "GIDS", "SANDBOX", "POD", "CHOSEN BY", "SINCE")
	for _, h := range holders {
		t.row(mappings(h.GetUserns().GetUids()), mappings(h.GetUserns().GetGids()), shorten(h.GetSandboxId()),
			h.GetPodNamespace()+"/"+h.GetPodName(), h.GetOrigin(), age(h.GetSince(), now))
	}
	t.flush()
}

func addQuarantine(b *bytes.Buffer, ranges []*podfsmv1.QuarantinedIDs) {
	if len(ranges) == 0 {
		return
	}
	b.WriteString("\nQuarantine\n")
	t := newTable(b, "UIDS", "GIDS", "USED BY")
	for _, q := range ranges {
		t.row(mappings(q.GetUserns().GetUids()), mappings(q.GetUserns().GetGids()), q.GetUsedBy())
	}
	t.flush()
}

func addRefusals(b *bytes.Buffer, refusals []*podfsmv1.IDRefusal, now time.Time) {
	if len(refusals) == 0 {
		return
	}
	b.WriteString("\nRefused\n")
	t := newTable(b, "POD", "LAST", "TIMES", "REASON")
	for _, r := range refusals {
		t.row(r.GetPodNamespace()+"/"+r.GetPodName(), age(r.GetAt(), now), strconv.FormatUint(uint64(r.GetCount()), 10), r.GetReason())
	}
	t.flush()
}
