package cri

import (
	"crypto/tls"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// looksPerCut is how often watch examines a connection within [cutTimeout].
const looksPerCut = 10

// watch ends the session once its client's network is cut. It returns when the session has ended.
//
// TCP_USER_TIMEOUT can't do this. It also ends the connection of a client that reads nothing for a while, but
// whose kernel acknowledges every probe of its closed window.
func (s *session) watch() {
	conn := s.conn
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	every := s.streams.cut / looksPerCut
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	var unanswered time.Duration
	for {
		select {
		case <-ticker.C:
		case <-s.ctx.Done():
			return
		}
		info, err := tcpInfo(conn.(*net.TCPConn))
		if err != nil {
			return // the connection is closed
		}
		if unanswered = unansweredFor(info, unanswered+every); unanswered >= s.streams.cut {
			s.cancel(errCut)
			return
		}
	}
}

func tcpInfo(conn *net.TCPConn) (info *unix.TCPInfo, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	if controlErr != nil {
		return nil, controlErr
	}
	return info, err
}

// unansweredFor is how long the peer has acknowledged nothing of what was sent, at most waited. Data and probes may
// be minutes apart, so the time of the last acknowledgement alone says nothing.
func unansweredFor(info *unix.TCPInfo, waited time.Duration) time.Duration {
	probed := info.Probes > 0
	sent := info.Unacked > 0 && info.Last_data_sent < info.Last_ack_recv
	if !probed && !sent {
		return 0
	}
	return min(waited, time.Duration(info.Last_ack_recv)*time.Millisecond)
}
